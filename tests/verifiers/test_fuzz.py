"""Whatever a model writes, every verifier answers with scores in range. `python -m bench.verifiers --soak` does this 10⁶ times."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verifier_cases import FRAGMENTS, fuzzed_response
from tests.verifiers.test_adversarial import EVEN, GOLDS, spec_of
from verifiers import RewardOptions, RewardSpec, score_batch

SPECS = [spec_of(verifier, EVEN) for verifier in GOLDS if verifier != "mathverify"]
EMPTY = RewardSpec(ground_truth="[]", verifier="detection", verifier_parm={"det_reward_ratio": EVEN})


def check(response: str, specs: list[RewardSpec], options: RewardOptions) -> None:
    for verdict in score_batch([response] * len(specs), specs, 0.5, options=options):
        assert verdict.status in ("ok", "bad_answer"), (response, verdict)
        values = (verdict.reward, verdict.accuracy, verdict.format)
        assert all(0.0 <= value <= 1.0 + 1e-12 for value in values), (response, verdict)


@pytest.mark.parametrize("matching", ["greedy", "optimal"])
def test_strung_fragments_of_answers_are_scored(matching: str) -> None:
    rng = random.Random(23)
    for _ in range(1_500):
        check(fuzzed_response(rng), [*SPECS, EMPTY], RewardOptions(matching=matching))


@given(st.text() | st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join))
def test_any_text_is_scored(response: str) -> None:
    check(response, [*SPECS, EMPTY], RewardOptions())
    check(f"<answer>{response}</answer>", [*SPECS, EMPTY], RewardOptions())

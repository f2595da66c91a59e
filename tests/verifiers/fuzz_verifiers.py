"""Coverage-guided fuzzing of everything that reads model output: `python -m tests.verifiers.fuzz_verifiers -max_total_time=60`.

Needs atheris (`pip install atheris`). pytest does not collect it; tests/verifiers/test_fuzz.py strings fragments instead.
"""

import sys

import atheris

from bench.verifier_cases import FRAGMENTS

with atheris.instrument_imports(include=["verifiers"]):
    from verifiers import RewardSpec, score_batch
    from verifiers.kinds.mathverify import nesting_depth
    from verifiers.kinds.plain_answers import boxed_answer, decide

GOLD = "[{'bbox_2d': [10, 20, 30, 40], 'label': 'cat'}]"
SPECS = [
    RewardSpec(
        ground_truth=GOLD, verifier="detection", verifier_parm={"det_reward_ratio": {"map": 1, "iou_max_iou_first": 1}}
    ),
    RewardSpec(ground_truth="B", verifier="multiple_choice"),
    RewardSpec(ground_truth="3", verifier="counting"),
    RewardSpec(ground_truth="stop sign", verifier="ocr"),
    RewardSpec(ground_truth="[0, 0, 10, 10]", verifier="point"),
    RewardSpec(ground_truth="[[0, 0], [9, 0], [9, 9]]", verifier="polygon"),
    RewardSpec(ground_truth="[10, 20]", verifier="temporal"),
    RewardSpec(ground_truth='{"a": 1}', verifier="json_fields"),
]


def target(data: bytes) -> None:
    """Any text, bare and between answer tags: a score in range from every verifier, and no exception from the readers."""
    provider = atheris.FuzzedDataProvider(data)
    pieces = provider.ConsumeIntListInRange(provider.ConsumeIntInRange(0, 24), 0, len(FRAGMENTS) - 1)
    text = "".join(FRAGMENTS[piece] for piece in pieces) + provider.ConsumeUnicodeNoSurrogates(4_096)
    for response in (text, f"<answer>{text}</answer>"):
        for verdict in score_batch([response] * len(SPECS), SPECS, 0.5):
            assert verdict.status != "fault", verdict
            assert 0.0 <= verdict.reward <= 1.0 + 1e-12, verdict
    answer = boxed_answer(text)
    decide(text, answer if answer is not None else text)
    nesting_depth(text)


if __name__ == "__main__":
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()

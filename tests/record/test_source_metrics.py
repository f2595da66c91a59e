"""Source-level metrics against plain statements of what each key means."""

import json
import math
import re
import time
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.record.groups import scored, stats, trajectory, verdict
from verifiers import RewardOptions, Verdict
from vtriune.messages import ScoredGroup, Trajectory
from vtriune.record.source_metrics import REFLECTION_WORDS, evaluation_metrics, reflection_counts, source_metrics

SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0])
VERDICTS = st.builds(
    lambda status, reward, components: (
        verdict(None) if status == "fault" else Verdict(status, reward, reward, 1.0, components, "")
    ),
    st.sampled_from(["ok", "bad_answer", "fault"]),
    SCORES,
    st.dictionaries(st.sampled_from(["label_first_iou@50", "map"]), SCORES),
)
TRAJECTORIES = st.builds(
    trajectory,
    st.integers(1, 9),
    st.sampled_from(["", "wait", "Let me verify it.", "done"]),
    version=st.integers(0, 3),
    finish=st.sampled_from(["stop", "length"]),
)
GROUPS = st.lists(
    st.builds(
        lambda pairs, source: scored([pair[0] for pair in pairs], [pair[1] for pair in pairs], source=source),
        st.lists(st.tuples(VERDICTS, TRAJECTORIES), min_size=1, max_size=5),
        st.sampled_from(["a", "b_c", "d/e"]),
    ),
    min_size=1,
    max_size=6,
)


def pairs_of(groups: list[ScoredGroup]) -> list[tuple[Trajectory, Verdict]]:
    return [pair for group in groups for pair in zip(group.group.trajectories, group.verdicts, strict=True)]


def mean_or_none(values: list[float]) -> float | None:
    return fmean(values) if values else None


def stated(groups: list[ScoredGroup]) -> dict[str, float]:
    """Every key of one scope, each as its definition says, straight from the groups."""
    pairs = pairs_of(groups)
    judged = [(t, v) for t, v in pairs if v.status != "fault"]

    def is_right(v: Verdict) -> bool:
        return (
            v.components["label_first_iou@50"] >= 0.5
            if "label_first_iou@50" in v.components
            else v.accuracy >= 1 - 1e-6
        )

    right = [(t, v) for t, v in judged if is_right(v)]
    wrong = [(t, v) for t, v in judged if not is_right(v)]
    reflecting = [(t, v) for t, v in judged if t.text not in ("", "done")]
    plain = [(t, v) for t, v in judged if t.text in ("", "done")]
    judged_groups = [[v for v in group.verdicts if v.status != "fault"] for group in groups]
    judged_groups = [verdicts for verdicts in judged_groups if len(verdicts) > 1]
    flat = [verdicts for verdicts in judged_groups if len({v.reward for v in verdicts}) == 1]
    flat_right = [verdicts for verdicts in flat if all(map(is_right, verdicts))]
    keys = {
        "reward/mean": mean_or_none([v.reward for _, v in judged]),
        "reward/accuracy": mean_or_none([v.accuracy for _, v in judged]),
        "reward/format": mean_or_none([v.format for _, v in judged]),
        "correct/rate": len(right) / len(judged) if judged else None,
        "length/mean": mean_or_none([len(t.token_ids) for t, _ in pairs]),
        "length/correct": mean_or_none([len(t.token_ids) for t, _ in right]),
        "length/incorrect": mean_or_none([len(t.token_ids) for t, _ in wrong]),
        "truncation/rate": mean_or_none([t.finish_reason == "length" for t, _ in pairs]),
        "truncation/correct": mean_or_none([t.finish_reason == "length" for t, _ in right]),
        "truncation/incorrect": mean_or_none([t.finish_reason == "length" for t, _ in wrong]),
        "reflection/ratio": mean_or_none([t.text not in ("", "done") for t, _ in pairs]),
        "reflection/correct_with": mean_or_none([is_right(v) for _, v in reflecting]),
        "reflection/correct_without": mean_or_none([is_right(v) for _, v in plain]),
        "reflection/word/wait": mean_or_none([t.text == "wait" for t, _ in pairs]),
        "reflection/word/verify": mean_or_none([t.text == "Let me verify it." for t, _ in pairs]),
        "verdict/ok": mean_or_none([v.status == "ok" for _, v in pairs]),
        "verdict/bad_answer": mean_or_none([v.status == "bad_answer" for _, v in pairs]),
        "verdict/fault": mean_or_none([v.status == "fault" for _, v in pairs]),
        "verdict/num_faults": len(pairs) - len(judged),
        "group/zero_variance": len(flat) / len(judged_groups) if judged_groups else None,
        "group/all_right": len(flat_right) / len(judged_groups) if judged_groups else None,
        "group/all_wrong": (len(flat) - len(flat_right)) / len(judged_groups) if judged_groups else None,
        "entropy/sampled": -sum(float(t.logprobs.sum()) for t, _ in pairs) / sum(len(t.token_ids) for t, _ in pairs),
        "staleness/mean": fmean(4 - t.oldest_version for t, _ in pairs),
        "staleness/max": max(4 - t.oldest_version for t, _ in pairs),
        "batch/num_groups": len(groups),
        "batch/num_responses": len(pairs),
    }
    for name in ("label_first_iou@50", "map"):
        keys[f"component/{name}"] = mean_or_none([v.components[name] for _, v in judged if name in v.components])
    return {key: value for key, value in keys.items() if value is not None}


@settings(max_examples=150, deadline=None)
@given(GROUPS)
def test_every_key_means_what_it_says_over_all_and_per_source(groups: list[ScoredGroup]) -> None:
    metrics = source_metrics(stats(groups), version=4)
    expected = stated(groups)
    for source in {group.source for group in groups}:
        own = [group for group in groups if group.source == source]
        expected |= {f"source/{source}/{key}": value for key, value in stated(own).items()}
        expected[f"source/{source}/batch/share"] = len(own) / len(groups)
    silent = {key for key in metrics if "/word/" in key and not key.endswith(("wait", "verify"))}
    assert {key for key in silent if metrics[key] != 0} == set()
    assert metrics.keys() - silent == expected.keys()
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(GROUPS)
def test_figures_fit_into_json_and_do_not_depend_on_the_order_of_groups(groups: list[ScoredGroup]) -> None:
    metrics = source_metrics(stats(groups), version=5)
    assert all(math.isfinite(value) for value in metrics.values())
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics == pytest.approx(source_metrics(stats(groups[::-1]), version=5))


def test_a_fault_is_counted_and_touches_no_mean() -> None:
    with_fault = source_metrics(stats([scored([verdict(1.0), verdict(None), verdict(0.0)])]))
    assert (with_fault["reward/mean"], with_fault["verdict/num_faults"]) == (0.5, 1.0)
    only_faults = source_metrics(stats([scored([verdict(None)] * 2)]))
    assert "reward/mean" not in only_faults
    assert only_faults["verdict/fault"] == 1.0
    assert source_metrics([]) == {}


def test_correct_follows_the_options_component_and_threshold() -> None:
    groups = [scored([verdict(0.2, 0.2, **{"map50": 0.7, "label_first_iou@50": 0.1}), verdict(1.0)])]
    assert source_metrics(stats(groups))["correct/rate"] == 0.5
    assert source_metrics(stats(groups, RewardOptions(correct_threshold=0.1)))["correct/rate"] == 1.0
    by_map = RewardOptions(correct_component="map50", correct_threshold=0.6)
    assert source_metrics(stats(groups, by_map))["correct/rate"] == 1.0


def test_evaluation_has_rewards_per_source_and_nothing_of_the_batch() -> None:
    groups = stats([scored([verdict(1.0)], source="a"), scored([verdict(0.0, map=0.25)], source="b")])
    metrics = evaluation_metrics(groups)
    assert metrics["eval/reward/mean"] == 0.5
    assert (metrics["eval/source/a/reward/mean"], metrics["eval/source/b/reward/mean"]) == (1.0, 0.0)
    assert metrics["eval/source/b/component/map"] == 0.25
    assert not [key for key in metrics if "share" in key or "zero_variance" in key or "reflection" in key]
    assert set(evaluation_metrics(groups, prefix="eval/greedy")) == {
        key.replace("eval/", "eval/greedy/", 1) for key in metrics
    }


@given(
    st.lists(
        st.sampled_from(
            [*REFLECTION_WORDS, "waiting", "rechecked", "yeti", "verify2", "await", "so", "again", "check"]
        ),
        max_size=8,
    )
)
def test_reflection_words_are_counted_as_whole_words(words: list[str]) -> None:
    text = ". ".join(words)
    for word in REFLECTION_WORDS:
        assert reflection_counts(text).get(word, 0) == len(re.findall(rf"(?<!\w){word}(?!\w)", text))


def test_reflection_words_are_found_in_any_case_and_over_line_breaks() -> None:
    assert reflection_counts("WAIT, Wait; try\n again! Re-Check") == {"wait": 2, "try again": 1, "re-check": 1}
    assert reflection_counts("Overweight waiters await Yetis. reevaluated") == {}


def test_a_step_of_the_papers_size_is_summarised_in_seconds() -> None:
    words = ("the area of this triangle equals the sum " * 180).strip()
    responses = [trajectory(1500, f"{words} wait, let me verify {words}", seed=1)] * 8
    group = scored([verdict(1.0, **{f"component{i}": 0.5 for i in range(12)})] * 8, responses)
    started = time.process_time()
    source_metrics(stats([group] * 64))
    assert (time.process_time() - started) * 1024 / 64 < 30


def test_a_source_called_owner_slash_set_is_evaluated_like_any_other() -> None:
    names = ("set", "owner/set", "owner/set/reward", "owner")
    by_name = {name: stats([scored([verdict(1.0, map=0.25)], source=name)]) for name in names}
    metrics = evaluation_metrics([group for groups in by_name.values() for group in groups])
    alone = {key for key in evaluation_metrics(by_name["set"]) if key.startswith("eval/source/")}
    for name in names:
        assert {key.replace("source/set/", f"source/{name}/") for key in alone} <= metrics.keys(), name
    assert len(metrics) == len(alone) * (1 + len(names))

"""The pool's figures: begun anew when taken, and those of several pools as one's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers import Verdict
from verifiers.pool.figures import PoolMetrics, merged

VERDICTS = st.lists(
    st.tuples(st.sampled_from(["mathverify", "detection"]), st.sampled_from(["ok", "bad_answer", "fault"]), st.floats(0, 9)),
    max_size=20,
)  # fmt: skip


def recorded(verdicts: list[tuple[str, str, float]]) -> PoolMetrics:
    metrics = PoolMetrics()
    for verifier, status, latency_s in verdicts:
        metrics.record(verifier, "rows", Verdict(status, 0.0, 0.0, 0.0, {}, ""), latency_s)  # type: ignore[arg-type]
        metrics.counts["num_cached"] += 1
    return metrics


@given(st.lists(VERDICTS, max_size=4))
def test_pools_together_have_the_figures_of_one_that_scored_it_all(pools: list[list[tuple[str, str, float]]]) -> None:
    whole = recorded([verdict for verdicts in pools for verdict in verdicts]).snapshot()
    figures = merged([recorded(verdicts).snapshot() for verdicts in pools])
    assert figures.keys() == (whole.keys() if pools else set())
    for key in figures:
        if key.rpartition("/")[2].startswith("num_") or key.endswith("_rate"):
            assert figures[key] == pytest.approx(whole[key]), key
        elif "latency" in key:
            assert figures[key] >= whole[key], key


def test_what_was_taken_is_not_counted_again() -> None:
    metrics = recorded([("mathverify", "fault", 2.0)] * 3)
    assert metrics.take()["verifier/mathverify/fault_rate"] == 1.0
    assert metrics.take() == dict.fromkeys(PoolMetrics().snapshot(), 0.0)
    metrics.record("mathverify", "rows", Verdict("ok", 1.0, 1.0, 1.0, {}, ""), 1.0)
    figures = metrics.take()
    assert (figures["verifier/mathverify/fault_rate"], figures["verifier/mathverify/latency_p99_s"]) == (0.0, 1.0)

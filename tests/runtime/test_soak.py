"""The long runs of `python -m bench.messaging --soak`, in sizes a test suite can afford."""

import pytest

from tests.runtime import soak


def test_memory_stays_flat_over_many_calls() -> None:
    growth = soak.memory(5_000)
    assert growth["caller_growth_MB"] < 5.0
    assert growth["callee_growth_MB"] < 5.0


def test_under_random_faults_every_call_ends_in_a_value_or_an_error_naming_the_rank() -> None:
    counts = soak.chaos(8)
    assert counts["values"] > 0
    assert counts["values"] + counts["errors"] == 8 * 40


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_calls_two_hundred_faults_and_a_million_frames_of_garbage_harm_nobody() -> None:
    growth = soak.memory(100_000)
    assert growth["caller_growth_MB"] < 5.0
    assert growth["callee_growth_MB"] < 5.0
    counts = soak.chaos(200)
    assert counts["values"] > 0
    assert counts["values"] + counts["errors"] == 200 * 40
    assert soak.garbage(1_000_000, settle_s=6.0)["target_growth_MB"] < 5.0


def test_garbage_on_the_socket_harms_nobody() -> None:
    assert soak.garbage(5_000)["target_growth_MB"] < 20.0

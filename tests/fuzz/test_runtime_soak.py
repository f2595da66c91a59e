"""The long runs of `python -m bench.messaging --soak`, in sizes a test suite can afford."""

from __future__ import annotations

from bench import messaging_soak


def test_memory_stays_flat_over_many_calls() -> None:
    growth = messaging_soak.memory(5_000)
    assert growth["caller_growth_MB"] < 5.0
    assert growth["callee_growth_MB"] < 5.0


def test_under_random_faults_every_call_ends_in_a_value_or_an_error_naming_the_rank() -> None:
    counts = messaging_soak.chaos(8)
    assert counts["values"] > 0
    assert counts["values"] + counts["errors"] == 8 * 40


def test_garbage_on_the_socket_harms_nobody() -> None:
    assert messaging_soak.garbage(5_000)["target_growth_MB"] < 20.0

"""Settings, figures and plot of throughput runs, from recorded metrics lines."""

from pathlib import Path

import pytest

from bench.throughput import Setting, plot, settings, summarise, table


def line(version: int, **changes: float) -> dict[str, float]:
    return {
        "version": version,
        "time/step_s": 4.0,
        "time/train_s": 1.5,
        "time/wait_s": 2.0,
        "batch/groups": 6.0,
        "throughput/tokens_per_s": 100.0,
        "throughput/learner/idle_share": 0.5,
        "time/publish/total_s": 0.5,
        "time/publish/pause_s": 0.1,
        "staleness/mean": 0.5,
        "staleness/max": 1.0,
    } | changes


def test_on_policy_runs_once_and_off_policy_at_every_bound() -> None:
    assert settings(["on_policy", "off_policy"], [0, 2]) == [
        Setting("on_policy", 0), Setting("off_policy", 0), Setting("off_policy", 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="neither on_policy nor off_policy"):
        settings(["offpolicy"], [1])


def test_an_on_policy_run_is_not_given_a_bound_that_launch_would_refuse() -> None:
    assert not any("max_staleness" in item for item in Setting("on_policy", 0).overrides("digits", Path("runs"), 4))
    assert "policy.max_staleness=2" in Setting("off_policy", 2).overrides("digits", Path("runs"), 4)


def test_rates_are_weighted_by_time_and_first_versions_are_left_out() -> None:
    lines = [
        line(1, **{"time/step_s": 100.0}),
        line(2),
        line(3, **{"time/step_s": 12.0, "throughput/tokens_per_s": 20.0, "throughput/learner/idle_share": 0.75}),
    ]
    figures = summarise(lines, group_size=8, num_unmeasured=1)
    assert figures["samples_per_s"] == pytest.approx(12 * 8 / 16)
    assert figures["tokens_per_s"] == pytest.approx((4 * 100 + 12 * 20) / 16)
    assert figures["learner_idle"] == pytest.approx((4 * 0.5 + 12 * 0.75) / 16)
    assert figures["max_staleness"] == 1
    assert figures["generator_idle"] is None


def test_the_table_and_the_plot_show_every_setting(tmp_path: Path) -> None:
    rows = [{"setting": name, **summarise([line(1), line(2)], 8, 0)} for name in ("on_policy", "off_policy-2")]
    text = table(rows)
    assert "on_policy" in text
    assert "off_policy-2" in text
    assert "–" in text, "a figure that a run does not record is shown as missing"
    plot(rows, tmp_path / "plots" / "throughput.png")
    assert (tmp_path / "plots" / "throughput.png").read_bytes().startswith(b"\x89PNG")

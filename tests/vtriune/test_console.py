"""What a person sees: one line per version when piped, a table of gains at the end."""

from typing import Any

import pytest

from vtriune.console import History, PlainScreen, RichScreen, open_screen, sparkline

VERSION_0 = {
    "version": 0.0,
    "eval/reward/mean": 0.4,
    "eval/sampled/reward/mean": 0.4,
    "eval/greedy/reward/mean": 0.6,
    "eval/sampled/source/digits_ocr/reward/mean": 0.3,
    "eval/greedy/source/digits_ocr/reward/mean": 0.5,
}
VERSION_1 = {
    "version": 1.0,
    "reward/mean": 0.5,
    "source/digits_ocr/reward/mean": 0.45,
    "staleness/max": 1.0,
    "time/step_s": 2.0,
}
VERSION_2 = {**{key: value + 0.25 for key, value in VERSION_0.items()}, "version": 2.0, "reward/mean": 0.7}


def test_without_a_terminal_each_version_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen("auto", "digits")
    assert isinstance(screen, PlainScreen)
    screen.set_total(2)
    for metrics in (VERSION_0, VERSION_1, VERSION_2):
        screen.show(metrics)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "version 1/2 · reward 0.500 · staleness ≤ 1 · 2.00 s" in lines[1]
    screen.close()
    closing = capsys.readouterr().out
    assert "digits_ocr" in closing
    assert "+0.250" in closing


def test_the_live_panel_shows_every_source_and_closes_with_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen("rich", "digits")
    assert isinstance(screen, RichScreen)
    screen.set_total(2)
    for metrics in (VERSION_0, VERSION_1, VERSION_2):
        screen.show(metrics)
    screen.close()
    shown = capsys.readouterr().out
    assert "digits_ocr" in shown
    assert "2/2 versions" in shown
    assert "+0.250" in shown


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_resumed_runs_table_begins_where_the_run_began(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen(kind, "digits")
    screen.set_total(2)
    screen.recall([VERSION_0, VERSION_1])
    screen.show(VERSION_2)
    screen.close()
    shown = capsys.readouterr().out
    assert "+0.250" in shown
    assert "version 0/2" not in shown


def test_one_evaluation_makes_no_table_of_gains() -> None:
    history = History()
    history.add(VERSION_0)
    assert history.closing_table() is None


def test_a_course_is_drawn_between_empty_and_full() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([0.3] * 1000)) <= 32

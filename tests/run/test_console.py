"""What a person sees: one line per version when piped, a table of gains at the end."""

import io
from typing import Any

import pytest
from rich.console import Console

from vtriune.messages import SampleRef
from vtriune.run.console import History, PlainScreen, RichScreen, lost_lines, open_screen, sparkline, summary
from vtriune.run.groups import Accounts, Groups
from vtriune.run.window import WindowLimits

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


def groups_of(num_broken: int, reason: str = "OSError: broken data stream") -> Groups:
    """Ten groups of two sources, two scored; so many lost, each after three attempts."""
    groups = Groups(WindowLimits(1, 1), 6)
    for number in range(10):
        groups.admit(SampleRef("train", number), ("even", "odd")[number % 2])
    for number in range(10):
        for _ in range(3 if number < num_broken else 1):
            attempt = groups.lease(number, 1.0)
            if number < num_broken:
                groups.lose(number, attempt, reason)
    groups.report(8, 0, is_filtered=True)
    groups.report(9, 0, is_filtered=False, is_faulted=True)
    return groups


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_the_closing_table_says_what_became_of_each_sources_groups_and_why_some_were_lost(
    kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = open_screen(kind, "digits")
    screen.account_for(groups_of(3))
    screen.close()
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    head = next(line for line in shown.splitlines() if "drawn" in line)
    assert [word.strip(" ┃") for word in head.split("┃")[1:-1]] == [
        "source", "drawn", "consumed", "filtered", "faulted", "lost", "open"
    ]  # fmt: skip
    assert rows == [
        ["even", "5", "0", "1", "0", "2", "2"],
        ["odd", "5", "0", "0", "1", "1", "3"],
        ["all", "10", "0", "1", "1", "3", "5"],
    ]
    assert "3 lost: OSError: broken data stream" in shown


def test_of_many_reasons_the_commonest_are_told_and_the_others_counted() -> None:
    accounts = Accounts({}, {f"reason {number}": number for number in range(1, 8)})
    assert lost_lines(accounts) == [
        *(f"{number} lost: reason {number}" for number in range(7, 2, -1)),
        "3 lost for 2 other reasons",
    ]


def test_what_a_version_did_not_measure_is_a_dash_and_the_canary_stands_in_for_the_mismatch() -> None:
    trained = {"batch/groups": 8.0, "time/step_s": 2.0, "mismatch/tokens": 0.0, "publish/canary_max_abs": 3e-6}
    assert summary({**trained, "reward/mean": 0.5, "staleness/max": 1.0}) == [
        "reward 0.500", "staleness ≤ 1", "mismatch – · canary 3.0e-06", "2.00 s"
    ]  # fmt: skip
    assert summary({"batch/groups": 0.0}) == ["reward –", "staleness –", "mismatch – · canary –"]
    assert summary({**trained, "mismatch/max_abs": 1e-5})[2] == "mismatch 1.0e-05"
    assert summary({"eval/reward/mean": 0.5, "publish/canary_max_abs": 3e-6}) == ["held-out 0.500"]


def test_a_source_that_only_one_evaluation_measured_has_no_gain() -> None:
    history = History()
    history.add(VERSION_0)
    history.add({**VERSION_2, "eval/greedy/source/late/reward/mean": 0.5, "eval/sampled/source/late/reward/mean": 0.25})
    console = Console(file=io.StringIO(), width=120)
    console.print(history.closing_table())
    [row] = [line for line in console.file.getvalue().splitlines() if "late" in line]  # type: ignore[attr-defined]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["late", "–", "0.250", "–", "–", "0.500", "–"]


def test_a_course_is_drawn_between_empty_and_full() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([0.3] * 1000)) <= 32


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_names_that_look_like_markup_are_shown_as_they_are(kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen(kind, "[/b]of [4]")
    for line in (VERSION_0, VERSION_1, VERSION_2):
        screen.show({key.replace("digits_ocr", "[/red][b]ocr:x:"): value for key, value in line.items()})
    screen.close()
    shown = capsys.readouterr().out
    assert "[/red][b]ocr:x:" in shown
    assert kind == "plain" or "[/b]of [4]" in shown


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_whatever_the_console_raises_is_logged_and_the_run_goes_on(
    kind: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = open_screen(kind, "digits")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the terminal burns")

    monkeypatch.setattr("rich.console.Console.print", fail)
    monkeypatch.setattr("rich.live.Live.update", fail)
    screen.say("hello")
    screen.show(VERSION_1)
    screen.show(VERSION_2)
    screen.close()
    assert "the terminal burns" in caplog.text


def test_a_source_may_be_called_owner_slash_set_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    screen = open_screen("rich", "digits")
    rewards = {"owner/set": 0.111, "owner/set/part": 0.222, "all": 0.333}
    figures = {f"source/{name}/reward/mean": value for name, value in rewards.items()}
    held_out = {f"eval/{key}": value + 0.5 for key, value in figures.items()}
    screen.show({"version": 1.0, "reward/mean": 0.444, **figures, **held_out, "eval/reward/mean": 0.944})
    screen.close()
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line[:3] for line in shown if line and line[0] in rewards]
    assert rows[-4:] == [
        [name, f"{value:.3f}", f"{value + 0.5:.3f}"] for name, value in [*sorted(rewards.items()), ("all", 0.444)]
    ]

"""What a person sees of a run: a live panel on a terminal, one plain line per version elsewhere, a closing table. Called by launch.
A console that fails or that nobody can read any more costs the run nothing: that is logged, and what it says stands in the log too.
"""

import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Concatenate, Literal, ParamSpec, TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from verifiers import terminal
from vtriune.run.groups import Accounts, Groups

log = logging.getLogger(__name__)

S = TypeVar("S", bound="Screen")
P = ParamSpec("P")

SOURCE, REWARD = "source/", "/reward/mean"
CANARY = "publish/canary_max_abs"
SPARK = "▁▂▃▄▅▆▇█"


def open_screen(kind: Literal["auto", "rich", "plain"], name: str) -> "Screen":
    """`auto` is rich on a terminal and plain elsewhere."""
    is_rich = kind == "rich" or (kind == "auto" and sys.stdout.isatty())
    return RichScreen(name) if is_rich else PlainScreen()


class History:
    """Every version's figures that the panel and the closing table need."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.by_source: dict[str, list[float]] = {}
        self.evaluations: list[dict[str, float]] = []

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in one line of `metrics.jsonl`."""
        if "reward/mean" in metrics:
            self.rewards.append(metrics["reward/mean"])
        for key, value in metrics.items():
            if key.startswith(SOURCE) and key.endswith(REWARD):
                self.by_source.setdefault(key[len(SOURCE) : -len(REWARD)], []).append(value)
        if "eval/reward/mean" in metrics:
            self.evaluations.append(dict(metrics))

    def closing_table(self) -> Table | None:
        """Held-out reward per source, first and last evaluation, for every kind of sampling; None before two evaluations."""
        if len(self.evaluations) < 2:
            return None
        before, after = self.evaluations[0], self.evaluations[-1]
        kinds = [kind for kind in ("sampled", "greedy") if f"eval/{kind}/reward/mean" in after]
        table = Table(title="held-out reward, before → after", title_justify="left")
        table.add_column("source")
        for kind in kinds:
            for column in ("before", "after", "gain"):
                table.add_column(f"{kind}\n{column}", justify="right")
        prefix = f"eval/{kinds[0]}/source/"
        sources = sorted(
            key[len(prefix) : -len(REWARD)] for key in after if key.startswith(prefix) and key.endswith(REWARD)
        )
        for name, scope in [*((source, f"source/{source}/") for source in sources), ("all", "")]:
            row = [escape(name)]
            for kind in kinds:
                key = f"eval/{kind}/{scope}reward/mean"
                old, new = before.get(key), after.get(key)
                gain = None if old is None or new is None else new - old
                row += [_figure(old, "{:.3f}"), _figure(new, "{:.3f}"), _figure(gain, "{:+.3f}")]
            if not scope:
                table.add_section()
            table.add_row(*row, style=None if scope else "bold")
        return table


def _watching(method: Callable[Concatenate[S, P], None]) -> Callable[Concatenate[S, P], None]:
    """Whatever drawing runs into is logged: who looks on never ends the run."""

    @functools.wraps(method)
    def watch(screen: S, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(screen, *args, **kwargs)
        except Exception:
            # Any: it is a library's, a terminal's or ours, and none of them is a reason to stop training.
            log.exception("the console could not be drawn")
        screen.note_losses()

    return watch


class Screen:
    """Either kind of console, with what both remember."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._history = History()
        self._num_versions = 0
        self._groups: Groups | None = None
        self._has_noted_losses = False

    def note_losses(self) -> None:
        """Log, once, that output does not reach whoever started the run."""
        if not self._has_noted_losses and (why := terminal.lost()):
            self._has_noted_losses = True
            log.warning("the console cannot be written (%s); the run goes on, and its lines stand here", why)

    @_watching
    def say(self, text: str) -> None:
        """A line about the run as a whole."""
        log.info("%s", text)
        self._console.print(text, markup=False, soft_wrap=True)

    @_watching
    def show(self, metrics: dict[str, float]) -> None:
        """One version's line of `metrics.jsonl`."""
        self._history.add(metrics)

    @_watching
    def recall(self, lines: Iterable[dict[str, float]]) -> None:
        """The lines of the versions before a resume: they belong to the courses and to the closing table."""
        for line in lines:
            self._history.add(line)

    def set_total(self, num_versions: int) -> None:
        """The run's length, once the data are counted."""
        self._num_versions = num_versions

    def account_for(self, groups: Groups) -> None:
        """The run's groups, whose ends the closing tables tell."""
        self._groups = groups

    @_watching
    def close(self) -> None:
        """Leave the terminal as it was and print the closing tables."""
        if (table := self._history.closing_table()) is not None:
            self._console.print(table)
        if self._groups is not None and (accounts := self._groups.accounts()).by_source:
            self._console.print(accounts_table(accounts))
            for line in lost_lines(accounts):
                self._console.print(line, markup=False, soft_wrap=True)


class PlainScreen(Screen):
    """One line per version: for logs and pipes."""

    def __init__(self) -> None:
        super().__init__(Console(file=sys.stdout, width=120, highlight=False, emoji=False))
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        super().say(f"[{time.monotonic() - self._started:6.1f} s] {text}")

    @_watching
    def show(self, metrics: dict[str, float]) -> None:
        super().show(metrics)
        self.say(" · ".join([f"version {metrics['version']:.0f}/{self._num_versions}", *summary(metrics)]))


class RichScreen(Screen):
    """A live panel: progress and time left, throughput, reward per source with its course so far."""

    def __init__(self, name: str) -> None:
        super().__init__(Console(highlight=False, emoji=False))
        self._last: dict[str, float] = {}
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("versions"), TimeElapsedColumn(), TextColumn("left"))
        self._progress = Progress(TextColumn("[bold]{task.description}"), *columns, TimeRemainingColumn())
        self._task = self._progress.add_task(escape(name), total=None)
        self._live = Live(self._render(), console=self._console, refresh_per_second=4)
        self._live.start()

    @_watching
    def show(self, metrics: dict[str, float]) -> None:
        super().show(metrics)
        self._last = metrics
        self._progress.update(self._task, completed=metrics["version"])
        self._live.update(self._render())

    def recall(self, lines: Iterable[dict[str, float]]) -> None:
        for line in lines:
            self.show(line)

    def set_total(self, num_versions: int) -> None:
        self._progress.update(self._task, total=num_versions)

    @_watching
    def close(self) -> None:
        self._live.stop()
        super().close()

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for title in ("source", "reward", "held-out", "course"):
            table.add_column(title, justify="left" if title in ("source", "course") else "right")
        evaluation = self._history.evaluations[-1] if self._history.evaluations else {}
        by_source = sorted(self._history.by_source.items())
        rows = [(source, f"source/{source}/", course) for source, course in by_source]
        for source, scope, course in [*rows, ("all", "", self._history.rewards)]:
            key = f"eval/{scope}reward/mean"
            held_out = f"{evaluation[key]:.3f}" if key in evaluation else "–"
            reward = f"{course[-1]:.3f}" if course else "–"
            table.add_row(escape(source), reward, held_out, sparkline(course), style=None if scope else "bold")
        return Group(self._progress, " · ".join(summary(self._last)) or "starting", table)


def accounts_table(accounts: Accounts) -> Table:
    """What became of each source's groups: drawn is the sum of all other columns."""
    table = Table("source", title="groups", title_justify="left")
    for column in next(iter(accounts.by_source.values())):
        table.add_column(column, justify="right")
    for source, counts in accounts.by_source.items():
        table.add_row(escape(source), *map(str, counts.values()))
    table.add_section()
    sums = (sum(column) for column in zip(*(counts.values() for counts in accounts.by_source.values()), strict=True))
    table.add_row("all", *map(str, sums), style="bold")
    return table


def lost_lines(accounts: Accounts, num_shown: int = 5) -> list[str]:
    """How many groups were lost and why, the commonest reasons first."""
    reasons = sorted(accounts.lost_reasons.items(), key=lambda item: -item[1])
    lines = [f"{count} lost: {reason}" for reason, count in reasons[:num_shown]]
    others = reasons[num_shown:]
    return lines + ([f"{sum(n for _, n in others)} lost for {len(others)} other reasons"] if others else [])


def summary(metrics: Mapping[str, float]) -> list[str]:
    """The figures worth a line: reward, staleness, agreement of generator and learner, speed.

    A trained version shows – for what its batch left unmeasured. Without a token of the learner's own version there is no mismatch; the
    canary, measured at every publish, tells then how far generators and learner are apart.
    """
    forms = (
        ("reward/mean", "reward {:.3f}", "reward –"),
        ("eval/reward/mean", "held-out {:.3f}", ""),
        ("length/mean", "{:.1f} tokens", ""),
        ("staleness/max", "staleness ≤ {:.0f}", "staleness –"),
        ("mismatch/max_abs", "mismatch {:.1e}", f"mismatch – · canary {_figure(metrics.get(CANARY), '{:.1e}')}"),
        ("throughput/completions_per_s", "{:.0f} completions/s", ""),
        ("time/step_s", "{:.2f} s", ""),
    )
    is_trained = "batch/groups" in metrics
    shown = (form.format(metrics[key]) if key in metrics else is_trained and without for key, form, without in forms)
    return [text for text in shown if text]


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def sparkline(values: list[float], width: int = 32) -> str:
    """`values` in [0, 1] as bars, averaged down to `width` characters."""
    if not values:
        return ""
    size = max(1, math.ceil(len(values) / width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    return "".join(SPARK[min(7, max(0, int(mean * 8)))] for mean in means)

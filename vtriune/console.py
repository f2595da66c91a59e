"""What a person sees of a run: a live panel on a terminal, one plain line per version elsewhere, a closing table. Called by launch."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

log = logging.getLogger(__name__)

SOURCE, REWARD = "source/", "/reward/mean"
SPARK = "▁▂▃▄▅▆▇█"


class Screen(Protocol):
    """Either kind of console."""

    def say(self, text: str) -> None:
        """A line about the run as a whole."""

    def show(self, metrics: dict[str, float]) -> None:
        """One version's line of `metrics.jsonl`."""

    def recall(self, lines: Iterable[dict[str, float]]) -> None:
        """The lines of the versions before a resume: they belong to the courses and to the closing table."""

    def set_total(self, num_versions: int) -> None:
        """The run's length, once the data are counted."""

    def close(self) -> None:
        """Leave the terminal as it was and print the closing table."""


def open_screen(kind: Literal["auto", "rich", "plain"], name: str) -> Screen:
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
            if key.startswith(SOURCE) and key.endswith(REWARD) and key.count("/") == 3:
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
        prefix = f"eval/{kinds[0]}/source/" if kinds else ""
        sources = sorted(
            key[len(prefix) : -len(REWARD)]
            for key in after
            if kinds and key.startswith(prefix) and key.endswith(REWARD)
        )
        for source in [*sources, None]:
            row = [source or "all"]
            for kind in kinds:
                key = f"eval/{kind}/source/{source}/reward/mean" if source else f"eval/{kind}/reward/mean"
                old, new = before.get(key, math.nan), after.get(key, math.nan)
                row += [f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}"]
            table.add_row(
                *row, end_section=source == (sources[-1] if sources else None), style=None if source else "bold"
            )
        return table


class PlainScreen:
    """One line per version: for logs and pipes."""

    def __init__(self) -> None:
        self._num_versions = 0
        self._history = History()
        self._started = time.monotonic()
        self._console = Console(file=sys.stdout, width=120, highlight=False)

    def say(self, text: str) -> None:
        self._console.print(f"[{time.monotonic() - self._started:6.1f} s] {text}", markup=False, soft_wrap=True)

    def show(self, metrics: dict[str, float]) -> None:
        self._history.add(metrics)
        self.say(" · ".join([f"version {metrics['version']:.0f}/{self._num_versions}", *summary(metrics)]))

    def recall(self, lines: Iterable[dict[str, float]]) -> None:
        for line in lines:
            self._history.add(line)

    def set_total(self, num_versions: int) -> None:
        self._num_versions = num_versions

    def close(self) -> None:
        if (table := self._history.closing_table()) is not None:
            self._console.print(table)


class RichScreen:
    """A live panel: progress and time left, throughput, reward per source with its course so far."""

    def __init__(self, name: str) -> None:
        self._history = History()
        self._last: dict[str, float] = {}
        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("versions"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task(name, total=None)
        self._live = Live(self._render(), console=self._console, refresh_per_second=4)
        self._live.start()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def show(self, metrics: dict[str, float]) -> None:
        self._history.add(metrics)
        self._last = metrics
        self._progress.update(self._task, completed=metrics["version"])
        self._live.update(self._render())

    def recall(self, lines: Iterable[dict[str, float]]) -> None:
        for line in lines:
            self.show(line)

    def set_total(self, num_versions: int) -> None:
        self._progress.update(self._task, total=num_versions)

    def close(self) -> None:
        self._live.stop()
        if (table := self._history.closing_table()) is not None:
            self._console.print(table)

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for title in ("source", "reward", "held-out", "course"):
            table.add_column(title, justify="left" if title in ("source", "course") else "right")
        evaluation = self._history.evaluations[-1] if self._history.evaluations else {}
        rows = {**dict(sorted(self._history.by_source.items())), "all": self._history.rewards}
        for source, course in rows.items():
            key = "eval/reward/mean" if source == "all" else f"eval/source/{source}/reward/mean"
            held_out = f"{evaluation[key]:.3f}" if key in evaluation else "–"
            reward = f"{course[-1]:.3f}" if course else "–"
            table.add_row(source, reward, held_out, sparkline(course), style="bold" if source == "all" else None)
        return Group(self._progress, " · ".join(summary(self._last)) or "starting", table)


def summary(metrics: Mapping[str, float]) -> list[str]:
    """The figures worth a line: reward, staleness, agreement of generator and learner, speed."""
    parts: list[str] = []
    for key, form in (
        ("reward/mean", "reward {:.3f}"),
        ("eval/reward/mean", "held-out {:.3f}"),
        ("length/mean", "{:.1f} tokens"),
        ("staleness/max", "staleness ≤ {:.0f}"),
        ("mismatch/max_abs", "mismatch {:.1e}"),
        ("throughput/completions_per_s", "{:.0f} completions/s"),
        ("time/step_s", "{:.2f} s"),
    ):
        if key in metrics:
            parts.append(form.format(metrics[key]))
    return parts


def sparkline(values: list[float], width: int = 32) -> str:
    """`values` in [0, 1] as bars, averaged down to `width` characters."""
    if not values:
        return ""
    size = max(1, math.ceil(len(values) / width))
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    return "".join(SPARK[min(7, max(0, int(mean * 8)))] for mean in means)

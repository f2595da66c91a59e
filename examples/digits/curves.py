"""Summaries and a plot of finished digits runs: `python -m examples.digits.curves RUN [RUN …] --out docs/digits`.

Writes `<out>.png` (reward over versions, one line per run, on- and off-policy apart; how tight boxes are; held-out reward per source)
and `<out>/<run>.jsonl` (per version: the figures the documentation quotes).
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from examples.digits.arms import BOXES
from verifiers import terminal

KEPT = (
    "version",
    "update",
    "reward/mean",
    "eval/reward/mean",
    "eval/sampled/reward/mean",
    "eval/greedy/reward/mean",
    "staleness/max",
    "mismatch/max_abs",
    "publish/canary_max_abs",
    "throughput/completions_per_s",
    "time/step_s",
    "policy/is_off_policy",
)
Run = list[dict[str, float]]


def read(folder: Path) -> Run:
    """The lines of a run's metrics.jsonl, one per version."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summarise(run: Run) -> Run:
    """Each line with the kept keys, and every source's reward."""
    return [
        {key: round(value, 6) for key, value in line.items() if key in KEPT or key.endswith("/reward/mean")}
        for line in run
    ]


def gains(run: Run) -> dict[str, tuple[float, float]]:
    """Held-out mean reward before and after, per kind of sampling."""
    evaluations = [line for line in run if "eval/reward/mean" in line]
    keys = [f"eval/{kind}/reward/mean" for kind in ("sampled", "greedy")]
    return {key: (evaluations[0][key], evaluations[-1][key]) for key in keys if key in evaluations[-1]}


def sources(run: Run) -> dict[str, tuple[float, float]]:
    """Held-out sampled reward per source, before and after."""
    evaluations = [line for line in run if "eval/reward/mean" in line]
    prefix, suffix = "eval/sampled/source/", "/reward/mean"
    names = sorted(
        key[len(prefix) : -len(suffix)] for key in evaluations[-1] if key.startswith(prefix) and key.endswith(suffix)
    )
    return {
        name: tuple(line[f"{prefix}{name}{suffix}"] for line in (evaluations[0], evaluations[-1])) for name in names
    }


def draw(runs: dict[str, Run], path: Path) -> None:
    """Left: training and held-out reward by version. Middle: IoU of training's boxes. Right: held-out reward per source, mean over the
    runs."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), width_ratios=[3, 2, 2], layout="constrained")
    for run in runs.values():
        colour = "tab:orange" if any(line.get("policy/is_off_policy") for line in run) else "tab:blue"
        steps = [line for line in run if "reward/mean" in line]
        smooth = _smoothed([line["reward/mean"] for line in steps], 5)
        left.plot([line["version"] for line in steps], smooth, color=colour, alpha=0.8, linewidth=1)
        key = "eval/sampled/reward/mean"
        held_out = [(line["version"], line[key]) for line in run if key in line]
        left.plot(*zip(*held_out, strict=True), "o--", color=colour, markersize=4)
    for colour, label in (("tab:blue", "on-policy"), ("tab:orange", "off-policy, staleness ≤ 2")):
        left.plot([], [], color=colour, label=label)
    left.plot([], [], "o--", color="grey", markersize=4, label="held out, temperature 1")
    left.set(xlabel="version", ylabel="mean reward", title="reward by version, one line per run")
    left.legend(frameon=False)
    _draw_boxes(middle, list(runs.values()))
    _draw_sources(right, list(runs.values()))
    figure.savefig(path, dpi=110)


def _draw_boxes(axes: plt.Axes, runs: Sequence[Run]) -> None:
    """Mean IoU of training's box answers, counted from each of three thresholds on."""
    for level in ("50", "75", "95"):
        keys = [f"source/{source}/component/label_first_iou@{level}" for source in BOXES]
        by_version: dict[float, list[float]] = {}
        for line in (line for run in runs for line in run):
            by_version.setdefault(line["version"], []).extend(line[key] for key in keys if key in line)
        versions = sorted(version for version, values in by_version.items() if values)
        means = _smoothed([statistics.fmean(by_version[version]) for version in versions], 5)
        axes.plot(versions, means, label=f"IoU@{level}")
    axes.set(xlabel="version", title="boxes of training, mean over the runs")
    axes.legend(frameon=False)


def _draw_sources(axes: plt.Axes, runs: Sequence[Run]) -> None:
    tables = [sources(run) for run in runs]
    names = sorted(tables[0])
    for offset, (index, label) in enumerate(((0, "before"), (1, "after"))):
        means = [statistics.fmean(table[name][index] for table in tables) for name in names]
        axes.barh([row + 0.4 * offset for row in range(len(names))], means, height=0.38, label=label)
    axes.set_yticks([row + 0.2 for row in range(len(names))], names)
    axes.set(xlabel="held-out reward at temperature 1", xlim=(0, 1), title="mean over the runs")
    axes.invert_yaxis()
    axes.legend(frameon=False)


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def main() -> None:
    """The command line: prints each run's gains and writes summaries and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/digits"))
    options = parser.parse_args()
    runs = {folder.name: read(folder) for folder in options.runs}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, run in runs.items():
        lines = "".join(json.dumps(line) + "\n" for line in summarise(run))
        (options.out / f"{name}.jsonl").write_text(lines)
        steps = [line for line in run if "time/step_s" in line]
        mismatches = [line["mismatch/max_abs"] for line in steps if "mismatch/max_abs" in line]
        print(
            name,
            *(
                f"{key.split('/')[1]} {old:.3f} → {new:.3f} ({new - old:+.3f})"
                for key, (old, new) in gains(run).items()
            ),
            f"staleness ≤ {max(line['staleness/max'] for line in steps if 'staleness/max' in line):.0f}",
            f"mismatch ≤ {max(mismatches):.1e}" if mismatches else "mismatch –",
            f"median step {statistics.median(line['time/step_s'] for line in steps):.2f} s",
            sep=" · ",
        )
    draw(runs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    terminal.open_output()
    main()

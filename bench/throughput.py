"""Real runs of one configuration at several settings of the dial: `python -m bench.throughput FILE --modes … --staleness 0,1,2,4`.

Each setting is one `python -m vtriune.launch` of its own, one after the other, without evaluation and trackers; its
`metrics.jsonl` is read when it has ended. The first versions are left out: engines and kernels warm up in them. Prints a
table, and writes a JSON file and a plot.

| column         | from                                                                                                 |
| -------------- | ---------------------------------------------------------------------------------------------------- |
| samples/s      | groups consumed × group size / time of the versions                                                  |
| tokens/s       | `throughput/tokens_per_s`, weighted by time                                                          |
| learner idle   | `throughput/learner/idle_share`: it neither trained nor published; weighted by time, as those below  |
| generator idle | `throughput/generators/idle_share`, where the run records it                                         |
| verifier idle  | `throughput/verifiers/idle_share`: no group was being verified                                       |
| publish        | `time/publish/total_s` per version; in it transfer, and the engines' pause                           |
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import describe, heading, write_json
from verifiers import terminal
from vtriune.config import ConfigError, load

Line = dict[str, float]


class Setting(NamedTuple):
    """One run."""

    mode: str
    max_staleness: int

    @property
    def name(self) -> str:
        """In tables and run names."""
        return "on_policy" if self.mode == "on_policy" else f"off_policy-{self.max_staleness}"

    def overrides(self, base_name: str, folder: Path, steps: int) -> list[str]:
        """What launch is told beside the file."""
        staleness = [] if self.mode == "on_policy" else [f"policy.max_staleness={self.max_staleness}"]
        return [
            f"run.name={base_name}-{self.name}",
            f"run.folder={folder}",
            f"run.steps={steps}",
            f"policy.mode={self.mode}",
            *staleness,
            "evaluation.before=false",
            "evaluation.after=false",
            "evaluation.every=0",
            "checkpoint.every=0",
            # Quoted: to YAML a bare off is false.
            "tracking.wandb='off'",
            "tracking.console=plain",
        ]


class RunFailed(RuntimeError):
    """A setting's run ended with an error; the message holds its last lines."""


def settings(modes: Sequence[str], staleness: Sequence[int]) -> list[Setting]:
    """On-policy once, off-policy at every bound, in the order asked for. Raises ValueError for an unknown mode."""
    asked: list[Setting] = []
    for mode in modes:
        if mode not in ("on_policy", "off_policy"):
            raise ValueError(f"--modes: {mode!r} is neither on_policy nor off_policy")
        asked += [Setting(mode, 0)] if mode == "on_policy" else [Setting(mode, bound) for bound in staleness]
    return asked


def run(file: Path, setting: Setting, base_name: str, folder: Path, steps: int, extra: Sequence[str]) -> list[Line]:
    """Train one setting to its end; the lines of its metrics. Raises RunFailed."""
    command = [sys.executable, "-m", "vtriune.launch", str(file), "--fresh"]
    command += [*setting.overrides(base_name, folder, steps), *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RunFailed(f"{setting.name} ended with code {done.returncode}:\n{tail}")
    return read(folder / f"{base_name}-{setting.name}")


def read(run_folder: Path) -> list[Line]:
    """The lines of a finished run, version 0 (before any training) left out."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["version"] > 0]


def summarise(lines: Sequence[Line], group_size: int, num_unmeasured: int) -> dict[str, float | None]:
    """Means over the measured versions, weighted by time where they are rates. A figure that the run does not record is None."""
    measured = lines[num_unmeasured:] or lines
    seconds = sum(line["time/step_s"] for line in measured)
    num_groups = sum(line["batch/groups"] for line in measured)
    tokens = sum(line["throughput/tokens_per_s"] * line["time/step_s"] for line in measured)
    return {
        "samples_per_s": num_groups * group_size / seconds,
        "tokens_per_s": tokens / seconds,
        "step_s": seconds / len(measured),
        "train_s": _mean(measured, "time/train_s"),
        "wait_s": _mean(measured, "time/wait_s"),
        "learner_idle": _share(measured, "throughput/learner/idle_share"),
        "generator_idle": _share(measured, "throughput/generators/idle_share"),
        "verifier_idle": _share(measured, "throughput/verifiers/idle_share"),
        "publish_s": _mean(measured, "time/publish/total_s"),
        "transfer_s": _mean(measured, "time/publish/transfer_s"),
        "pause_s": _mean(measured, "time/publish/pause_s"),
        "publish_bytes": _mean(measured, "publish/bytes"),
        "mean_staleness": _mean(measured, "staleness/mean"),
        "max_staleness": max((line["staleness/max"] for line in measured if "staleness/max" in line), default=None),
        "reward": _mean(measured, "reward/mean"),
        "num_versions": float(len(measured)),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per setting; the first one's throughput is 1."""
    head = (
        f"{'setting':<14}{'samples/s':>11}{'×':>7}{'tokens/s':>11}{'step s':>9}{'train s':>9}{'wait s':>9}"
        f"{'learner idle':>14}{'generator idle':>16}{'verifier idle':>15}{'publish s':>11}{'pause s':>9}{'staleness':>14}"
    )
    return "\n".join([head, *(_line(row, rows[0]["samples_per_s"]) for row in rows)])


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Samples per second, and where the learner's time goes, per setting."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [row["setting"] for row in rows]
    figure, (speed, time) = plt.subplots(1, 2, figsize=(10, 4))
    speed.bar(names, [row["samples_per_s"] for row in rows])
    speed.set_ylabel("samples per second")
    bottom = [0.0] * len(rows)
    for key, label in (("train_s", "training"), ("publish_s", "publish"), ("wait_s", "waiting for groups")):
        heights = [row[key] or 0.0 for row in rows]
        time.bar(names, heights, bottom=bottom, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    time.set_ylabel("seconds per version")
    time.legend()
    for axes in (speed, time):
        axes.tick_params(axis="x", rotation=30)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: every run trained to its end; 1: one failed; 2: cannot be run as asked."""
    options = _parser().parse_intermixed_args(arguments)
    head = describe()
    print(heading(head))
    try:
        config = load(options.file, options.overrides)
        asked = settings(options.modes.split(","), [int(bound) for bound in options.staleness.split(",")])
    except (ConfigError, ValueError) as error:
        print(f"cannot run:\n{error}", file=sys.stderr)
        return 2
    folder = options.folder or Path(config.run.folder) / "throughput"
    rows: list[dict[str, Any]] = []
    for setting in asked:
        print(f"{setting.name}: {options.steps} versions …", flush=True)
        try:
            lines = run(options.file, setting, config.run.name, folder, options.steps, options.overrides)
        except RunFailed as failure:
            print(failure, file=sys.stderr)
            return 1
        rows.append({"setting": setting.name, **summarise(lines, config.policy.group_size, options.unmeasured)})
    print(table(rows))
    write_json(options.json or folder / "throughput.json", head, {"file": str(options.file), "rows": rows})
    plot(rows, options.plot or folder / "throughput.png")
    return 0


def _mean(lines: Sequence[Line], key: str) -> float | None:
    values = [line[key] for line in lines if key in line]
    return sum(values) / len(values) if values else None


def _share(lines: Sequence[Line], key: str) -> float | None:
    """A share of each line's time as one of all their time."""
    having = [line for line in lines if key in line]
    seconds = sum(line["time/step_s"] for line in having)
    return sum(line[key] * line["time/step_s"] for line in having) / seconds if having else None


def _line(row: dict[str, Any], first: float) -> str:
    def cell(value: float | None, width: int, form: str) -> str:
        return f"{'–' if value is None else format(value, form):>{width}}"

    staleness = f"{cell(row['mean_staleness'], 0, '.2f')} ≤ {cell(row['max_staleness'], 0, '.0f')}"
    return (
        f"{row['setting']:<14}{row['samples_per_s']:>11.1f}{row['samples_per_s'] / first:>7.2f}{row['tokens_per_s']:>11.0f}"
        f"{row['step_s']:>9.2f}{cell(row['train_s'], 9, '.2f')}{cell(row['wait_s'], 9, '.2f')}"
        f"{cell(row['learner_idle'], 14, '.0%')}{cell(row['generator_idle'], 16, '.0%')}"
        f"{cell(row['verifier_idle'], 15, '.0%')}"
        f"{cell(row['publish_s'], 11, '.3f')}{cell(row['pause_s'], 9, '.3f')}{staleness:>14}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description="Real runs at several settings.")
    parser.add_argument("file", type=Path, help="the run's YAML file, for example examples/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run")
    parser.add_argument("--modes", default="on_policy,off_policy")
    parser.add_argument("--staleness", default="0,1,2,4", help="bounds of the off-policy runs")
    parser.add_argument("--steps", type=int, default=8, help="versions of each run")
    parser.add_argument("--unmeasured", type=int, default=2, help="first versions left out of the figures")
    parser.add_argument("--folder", type=Path, help="of the runs; default: <run.folder>/throughput")
    parser.add_argument("--json", type=Path, help="default: throughput.json in that folder")
    parser.add_argument("--plot", type=Path, help="default: throughput.png in that folder")
    return parser


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

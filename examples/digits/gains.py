"""What runs of several seeds gained on held-out rows, and whether the demo keeps its promises: `python -m examples.digits.gains RUN …`.

The runs differ in their seed alone. Differences are paired by row; intervals are 95 % bootstraps over rows of the seeds' mean.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from examples.digits import held_out
from examples.digits.build import SOURCES
from examples.digits.intervals import Effect, effect
from examples.digits.scenes import PERCEPTION
from verifiers import terminal
from verifiers.scoring import score_batch
from vtriune.record import RecordedRun, open_run

BOXES = tuple(SOURCES[task] for task in PERCEPTION)
VERSIONS_LOOKED_AT = 5
Pairs = Sequence[tuple[held_out.Evaluation, held_out.Evaluation]]


def gain(pairs: Pairs, kind: str, source: str, name: str = "reward") -> Effect:
    """Of one source, over the runs."""
    key = (kind, source)
    return effect([held_out.difference(before[key], after[key], name) for before, after in pairs])


def means(pairs: Pairs, kind: str, source: str, name: str = "reward") -> tuple[float, float]:
    """Before and after, over the runs."""
    key = (kind, source)
    before, after = (
        float(np.mean([each[key].figures[name].mean() for each in side])) for side in zip(*pairs, strict=True)
    )
    return before, after


def table(pairs: Pairs) -> Iterator[str]:
    """Markdown: a line per source."""
    yield "| source | sampled before → after | gain | greedy before → after | gain |"
    yield "| --- | --- | --- | --- | --- |"
    for source in SOURCES.values():
        cells = []
        for kind in ("sampled", "greedy"):
            old, new = means(pairs, kind, source)
            cells += [f"{old:.3f} → {new:.3f}", str(gain(pairs, kind, source))]
        yield f"| {source} | {' | '.join(cells)} |"
    yield ""
    yield "| boxes, sampled | IoU@50 | IoU@75 | IoU@95 |"
    yield "| --- | --- | --- | --- |"
    for source in BOXES:
        told = []
        for name in held_out.IOUS:
            old, new = means(pairs, "sampled", source, name)
            told.append(f"{old:.3f} → {new:.3f} {gain(pairs, 'sampled', source, name)}")
        yield f"| {source} | {' | '.join(told)} |"


def reached(run: RecordedRun) -> Iterator[tuple[float, float]]:
    """Each threshold of the run's `iou_schedule` but the first, and the share of training's box answers of which a box meets it in the
    VERSIONS_LOOKED_AT versions from where it begins; NaN where none was archived."""
    steps, options = run.config.rewards.iou_schedule, run.config.rewards.options
    for before, step in pairwise(steps):
        first = 1 + round(before.until * (run.config.run.steps or 0))
        versions = range(first, first + VERSIONS_LOOKED_AT)
        answers = [
            answer
            for version in versions
            for answer in run.answers("version", version)
            if answer.header.reward.verifier == "detection"
        ]
        verdicts = score_batch(
            [answer.text for answer in answers], [answer.header.reward for answer in answers], None,
            options=replace(options, evaluation_threshold=step.threshold),
            image_sizes=[answer.image_sizes for answer in answers],
        )  # fmt: skip
        met = [one.components.get("iou_max_label_first", 0.0) > 0 for one in verdicts]
        yield step.threshold, float(np.mean(met)) if met else math.nan


def promises(pairs: Pairs, lines: Sequence[dict[str, float]]) -> Iterator[tuple[bool, str]]:
    """Each promise of the demo: whether it was kept, and the figures."""
    sampled = {source: gain(pairs, "sampled", source) for source in SOURCES.values()}
    mean = float(np.mean([each.mean for each in sampled.values()]))
    yield mean >= 0.15, f"sampled, mean over sources {mean:+.3f}, at least +0.150"
    for source, found in sampled.items():
        yield found.low > 0 and found.mean >= 0.05, f"sampled, {source} {found}: above 0, at least +0.050"
    for source in SOURCES.values():
        found = gain(pairs, "greedy", source)
        yield found.high >= 0, f"greedy, {source} {found}: does not fall beyond its interval"
    for source in BOXES:
        loose = gain(pairs, "sampled", source, "label_first_iou@50")
        yield loose.mean >= 0.10, f"IoU@50, {source} {loose}: at least +0.100"
        old, new = means(pairs, "sampled", source, "label_first_iou@95")
        yield new >= 2 * old and new - old >= 0.05, f"IoU@95, {source} {old:.3f} → {new:.3f}: doubles, at least +0.050"
    staleness = max(line.get("staleness/max", 0.0) for line in lines)
    if any(line.get("policy/is_off_policy") for line in lines):
        yield 0 < staleness <= 2, f"off-policy: staleness/max {staleness:.0f}, above 0 and at most 2"
    mismatch = max(line.get("mismatch/max_abs", 0.0) for line in lines)
    yield mismatch <= 1e-4, f"mismatch/max_abs {mismatch:.1e}, at most 1e-4"


def main() -> None:
    """The command line; exit code 1 where a promise is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    pairs = [held_out.first_and_last(run) for run in runs]
    lines = [json.loads(line) for run in runs for line in (run / "metrics.jsonl").read_text().splitlines()]
    print(*table(pairs), "", sep="\n")
    kept = list(promises(pairs, lines))
    for run in runs:
        kept += [
            (
                share >= 0.05,
                f"{run.name}: IoU {threshold:g} is met by {share:.1%} of answers when it begins, at least 5 %",
            )
            for threshold, share in reached(open_run(run))
        ]
    for is_kept, text in kept:
        print("kept    " if is_kept else "NOT KEPT", text)
    raise SystemExit(0 if all(is_kept for is_kept, _ in kept) else 1)


if __name__ == "__main__":
    terminal.open_output()
    main()

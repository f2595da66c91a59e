"""Held-out boxes before and after a run, as a picture: `python -m examples.digits.before_after RUN` writes RUN/boxes.png.

The first rows of the two box tasks, answered greedily: above at the first evaluation, below at the last. Green is the gold, red the
answer.
"""

import argparse
import io
from itertools import islice
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import pyarrow.parquet as pq
from matplotlib.patches import Rectangle
from PIL import Image

from examples.digits.build import SOURCES
from examples.digits.scenes import PERCEPTION
from verifiers import terminal
from verifiers.kinds.boxes import parse_boxes
from vtriune.messages import ScoredGroup
from vtriune.record import archive

NUM_COLUMNS = 5
"""Pictures of each box task."""


def shown(path: Path) -> list[ScoredGroup]:
    """The first greedy answers of each box task in an archived evaluation, in the order of their rows."""
    groups = [archived.group for archived in archive.read(path)]
    greedy = [each for each in groups if each.group.lease.sampling.temperature == 0]
    greedy.sort(key=lambda each: each.group.lease.header.file_row)
    of_source = (
        islice((each for each in greedy if each.group.lease.header.source == SOURCES[task]), NUM_COLUMNS)
        for task in PERCEPTION
    )
    return [each for groups in of_source for each in groups]


def draw(axes: plt.Axes, scored: ScoredGroup) -> None:
    """One picture with its gold boxes and those of its first answer."""
    lease = scored.group.lease
    row = pq.read_table(lease.header.file, columns=["images", "prompt"]).slice(lease.header.file_row, 1).to_pylist()[0]
    picture = Image.open(io.BytesIO(row["images"][0]["bytes"]))
    axes.imshow(picture)
    for colour, text in (
        ("tab:green", lease.header.reward.ground_truth),
        ("tab:red", scored.group.trajectories[0].text),
    ):
        body = text.rpartition("<answer>")[2].partition("</answer>")[0]
        for box in parse_boxes(body).boxes:
            x1, y1, x2, y2 = (value / 1000 * side for value, side in zip(box.bbox_2d, picture.size * 2, strict=True))
            axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.5))
    axes.set_title(row["prompt"][-1]["content"].removeprefix("<image>").partition(" Think")[0], fontsize=7)
    iou = scored.verdicts[0].components.get("label_first_iou@50", 0.0)
    axes.set_xlabel(f"IoU {iou:.2f}", fontsize=7, labelpad=2)
    axes.set(xticks=[], yticks=[])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    evaluations = archive.files(run / "rollouts", "evaluation")
    if len(evaluations) < 2:
        raise SystemExit(
            f"{run}: {len(evaluations)} archived evaluations; a run has two with evaluation.before and .after"
        )
    (first, before), (last, after) = evaluations[0], evaluations[-1]
    tables = shown(before), shown(after)
    figure, axes = plt.subplots(2, len(tables[0]), figsize=(1.5 * len(tables[0]), 4), layout="constrained")
    for line, groups, version in zip(axes, tables, (first, last), strict=True):
        for each, scored in zip(line, groups, strict=True):
            draw(each, scored)
        line[0].set_ylabel(f"version {version}")
    figure.savefig(run / "boxes.png", dpi=130)
    print(run / "boxes.png")


if __name__ == "__main__":
    terminal.open_output()
    main()

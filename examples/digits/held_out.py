"""A run's held-out answers row by row, from its archive: what intervals and comparisons of runs are made of."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from vtriune.record import archive

IOUS = ("label_first_iou@50", "label_first_iou@75", "label_first_iou@95")
_COLUMNS = ["source", "sample_id", "temperature", "reward", "components"]


class Answers(NamedTuple):
    """One evaluation's answers of one kind of sampling from one source, in the order of their sample ids."""

    ids: tuple[str, ...]
    figures: dict[str, np.ndarray]
    """reward, and for box tasks IOUS, each (rows,)."""


Evaluation = dict[tuple[str, str], Answers]
"""(kind, source) → answers; kind is sampled or greedy."""


def read(path: Path) -> Evaluation:
    """One archived evaluation. An answer without a verdict, a fault of ours, is left out."""
    rows: dict[tuple[str, str], list[tuple[str, dict[str, float]]]] = defaultdict(list)
    for row in pq.read_table(path, columns=_COLUMNS).to_pylist():
        if row["reward"] is None:
            continue
        kind = "greedy" if row["temperature"] == 0 else "sampled"
        components = dict(row["components"])
        ious = {name: components.get(name, 0.0) for name in IOUS} if components else {}
        rows[kind, row["source"]].append((row["sample_id"], {"reward": row["reward"], **ious}))
    return {key: _answers(found) for key, found in rows.items()}


def _answers(found: list[tuple[str, dict[str, float]]]) -> Answers:
    found.sort(key=lambda pair: pair[0])
    names = {name for _, figures in found for name in figures}
    return Answers(
        tuple(sample_id for sample_id, _ in found),
        # An answer without a box has no components: nothing was found.
        {name: np.array([figures.get(name, 0.0) for _, figures in found]) for name in names},
    )


def first_and_last(run: Path) -> tuple[Evaluation, Evaluation]:
    """The evaluations before and after training. Raises ValueError where the run has no two."""
    found = archive.files(run / "rollouts", "evaluation")
    if len(found) < 2:
        raise ValueError(f"{run}: {len(found)} archived evaluations; it has two with evaluation.before and .after")
    return read(found[0][1]), read(found[-1][1])


def difference(before: Answers, after: Answers, name: str) -> np.ndarray:
    """(rows,) after minus before of the rows that both answered."""
    places = {sample_id: place for place, sample_id in enumerate(before.ids)}
    pairs = [(places[sample_id], place) for place, sample_id in enumerate(after.ids) if sample_id in places]
    if not pairs:
        raise ValueError("two evaluations without a row in common: they were of different data")
    old, new = np.array(pairs).T
    return np.asarray(after.figures[name][new] - before.figures[name][old])

"""The table of finished ablation runs, and what it says of the paper's claims: `docs/claims.md`, with a picture each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from examples.digits.arms import ABLATIONS, BOXES, Ablation, Claim
from examples.digits.intervals import Effect, effect
from vtriune import whole_files

RESULTS = "results.jsonl"
Line = dict[str, Any]
Key = tuple[str, int, int]
_HEAD = """# The paper's claims, in small

Made by `python -m examples.digits.ablations --report` from `docs/claims/results.jsonl`; `python -m examples.digits.ablations NAME`
makes what is missing. A run is the demo (a 4 M-parameter model, handwritten digits, two cores) with the overrides of its arm. An
effect is the difference of two arms after training, paired by held-out row, at temperature 1, with the 95 % bootstrap interval over
rows of the seeds' mean. **Reproduced in small**: the interval leaves 0 out on the claim's side, and the effect is beyond the seeds'
standard deviation. **Reversed**: the same on the other side. **Not reproduced**: anything else. What holds here need not hold at 7B.
Arms train for the same number of versions: one with half of the sources sees each of them twice as often.
"""


def read(table: Path) -> list[Line]:
    """The finished runs; none where there is no table."""
    path = table / RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(line: Line) -> Key:
    """Arm, seed, versions."""
    return line["arm"], line["seed"], line["num_versions"]


def compare(claim: Claim, num_versions: int, lines: list[Line], table: Path) -> Effect | None:
    """Over the seeds that both arms have; None where there is none."""
    arms = [
        {line["seed"]: line for line in lines if line["arm"] == arm and line["num_versions"] == num_versions}
        for arm in (claim.better, claim.worse)
    ]
    pairs = [(arms[0][seed], arms[1][seed]) for seed in sorted(arms[0].keys() & arms[1].keys())]
    if not pairs:
        return None
    return effect([_values(one, claim, table) - _values(other, claim, table) for one, other in pairs])


def _values(line: Line, claim: Claim, table: Path) -> np.ndarray:
    """(rows,) after training, or (versions,) of training's answers for `early`."""
    if claim.measure == "early":
        return np.array(line["training_iou50"])
    with np.load(table / line["rows"]) as rows:
        return np.concatenate([rows[f"sampled/{source}/{claim.measure}/after"] for source in claim.sources])


def verdict(found: Effect | None) -> str:
    """In the words of the report."""
    if found is None:
        return "not yet measured"
    if not found.is_clear:
        return "not reproduced"
    return "reproduced in small" if found.mean > 0 else "reversed"


def report(table: Path) -> Path:
    """Write the page and the pictures beside the table; returns the page."""
    lines = read(table)
    parts = [_HEAD]
    for name, ablation in ABLATIONS.items():
        parts += ["", *_section(name, ablation, lines, table)]
    page = table.with_suffix(".md")
    whole_files.write(page, ("\n".join(parts) + "\n").encode())
    return page


def _section(name: str, ablation: Ablation, lines: list[Line], table: Path) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    if ablation.num_seeds == 1:
        yield f"One seed, {ablation.num_versions} versions: an indication, no more."
        yield ""
    yield "| claim | figure | effect | seeds | verdict |"
    yield "| --- | --- | --- | --- | --- |"
    for claim in ablation.claims:
        found = compare(claim, ablation.num_versions, lines, table)
        num_seeds = len(found.by_seed) if found else 0
        figure = {"early": "IoU@50 in training"}.get(claim.measure, claim.measure)
        yield f"| {claim.text} ({claim.better} − {claim.worse}) | {figure} | {found or '–'} | {num_seeds} | {verdict(found)} |"
    mine = [line for line in lines if line["arm"] in ablation.arms and line["num_versions"] == ablation.num_versions]
    if mine:
        yield ""
        yield from _arms(ablation, mine, table)
        draw(ablation, mine, table / f"{name}.png")
        yield ""
        yield f"![{name}]({table.name}/{name}.png)"


def _arms(ablation: Ablation, lines: list[Line], table: Path) -> Iterator[str]:
    """What every arm came to, the mean of its seeds."""
    yield "| arm | seeds | reward | boxes IoU@50 | IoU@75 | IoU@95 | measured |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for arm in ablation.arms:
        of_arm = [line for line in lines if line["arm"] == arm]
        if not of_arm:
            continue
        cells = []
        for name, sources in (("reward", None), *((f"label_first_iou@{t}", BOXES) for t in (50, 75, 95))):
            claim = Claim("", arm, arm, name, *([sources] if sources else []))
            cells.append(f"{np.mean([_values(line, claim, table).mean() for line in of_arm]):.3f}")
        dates = sorted({line["date"] for line in of_arm})
        yield f"| {arm} | {len(of_arm)} | {' | '.join(cells)} | {', '.join(dates)}, {of_arm[0]['machine']} |"


def draw(ablation: Ablation, lines: list[Line], path: Path) -> None:
    """Reward, and IoU@50 of box answers, in training by version: an arm a colour, a seed a line."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, (name, title) in zip(axes, (("reward", "reward"), ("training_iou50", "boxes: IoU@50")), strict=True):
        for place, arm in enumerate(ablation.arms):
            # An arm that trains on no boxes has no curve of them.
            for number, line in enumerate(each for each in lines if each["arm"] == arm and len(each[name]) >= 5):
                smooth = np.convolve(line[name], np.ones(5) / 5, "valid")
                axis.plot(smooth, color=f"C{place}", alpha=0.8, linewidth=1, label=arm if number == 0 else None)
        axis.set(xlabel="version", title=f"{title}, in training, mean of 5 versions")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)

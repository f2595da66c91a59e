"""Random workloads for the verifiers, and other people's answers to them: pycocotools, math-verify, plain Python.

Used by `python -m bench.verifiers` at full size and by tests/verifiers at a size for every day.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from verifiers import RewardSpec

Boxes = NDArray[np.float64]
Labels = NDArray[np.int64]
NAMES = ("cat", "dog", "person", "traffic light", "kite", "banana", "cup", "sheep")
WEIGHTS = {
    "iou_max_label_first": 1.0,
    "iou_max_iou_first": 0.5,
    "iou_completeness": 0.3,
    "map": 0.5,
    "map50": 0.2,
    "map75": 0.1,
}


def box_text(boxes_xyxy: Boxes, labels: Labels) -> str:
    """Boxes as a model writes them: single quotes, whole pixels."""
    items = (
        f"{{'bbox_2d': {[int(v) for v in box]}, 'label': '{NAMES[label]}'}}"
        for box, label in zip(boxes_xyxy, labels, strict=True)
    )
    return f"[{', '.join(items)}]"


def detection_workload(num_samples: int, seed: int = 0) -> tuple[list[str], list[RewardSpec]]:
    """Responses of 1 to 10 boxes, each a few pixels off the gold's, of three labels: the workload peers were measured on."""
    rng = np.random.default_rng(seed)
    responses, specs = [], []
    for _ in range(num_samples):
        num_boxes = int(rng.integers(1, 11))
        corners = rng.integers(0, 800, (num_boxes, 2))
        gold = np.concatenate([corners, corners + rng.integers(20, 200, (num_boxes, 2))], 1).astype(np.float64)
        labels = rng.integers(0, 3, num_boxes)
        predicted = np.sort((gold + rng.integers(-4, 5, gold.shape)).clip(0).reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        thought = "I look at the image from left to right and box each object I find."
        responses.append(f"<think>\n{thought}\n</think>\n<answer>\n{box_text(predicted, labels)}\n</answer>")
        parm = {"det_reward_ratio": WEIGHTS, "det_verifier_normalized": None, "verifier_style": "rule"}
        specs.append(RewardSpec(ground_truth=box_text(gold, labels), verifier="detection", verifier_parm=parm))
    return responses, specs


def coco_sample(rng: np.random.Generator, max_boxes: int = 50) -> tuple[Boxes, Labels, Boxes, Labels]:
    """Predicted and gold boxes with labels: 0 to max_boxes of each (gold at least 1), on a coarse grid so that ties and exact
    thresholds abound, with missing, extra and mislabelled ones.
    """
    num_classes = int(rng.integers(1, len(NAMES)))
    num_gold = int(rng.integers(1, max_boxes + 1)) if rng.random() < 0.5 else int(rng.integers(1, 6))
    grid = int(rng.choice([1, 5, 10]))

    def boxes(num: int) -> Boxes:
        corners = rng.integers(0, 40, (num, 2)) * grid
        return np.concatenate([corners, corners + rng.integers(1, 20, (num, 2)) * grid], 1).astype(np.float64)

    gold = boxes(num_gold)
    gold_labels = rng.integers(0, num_classes, num_gold)
    kept = rng.permutation(num_gold)[: int(rng.integers(0, num_gold + 1))]
    shifted = gold[kept] + rng.integers(-1, 2, (len(kept), 4)) * grid * (rng.random((len(kept), 1)) < 0.6)
    shifted[:, 2:] = np.maximum(shifted[:, 2:], shifted[:, :2] + grid)
    extra = boxes(
        int(rng.integers(0, max(1, max_boxes - len(kept)))) if rng.random() < 0.3 else int(rng.integers(0, 3))
    )
    predicted = np.concatenate([shifted, extra])
    labels = np.concatenate([gold_labels[kept], rng.integers(0, num_classes + 1, len(extra))]).astype(np.int64)
    wrong = rng.random(len(labels)) < 0.1
    labels[wrong] = rng.integers(0, num_classes + 1, int(wrong.sum()))
    order = rng.permutation(len(predicted))
    return predicted[order], labels[order], gold, gold_labels.astype(np.int64)


def as_coco(
    predicted: Boxes, labels: Labels, gold: Boxes, gold_labels: Labels
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A sample as COCO's ground truth and results, all scores 1."""

    def xywh(box: Boxes) -> list[float]:
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    truth = {
        "images": [{"id": 0}],
        "categories": [{"id": int(c), "name": str(c)} for c in sorted(set(gold_labels.tolist()))],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 0,
                "category_id": int(c),
                "bbox": xywh(b),
                "area": xywh(b)[2] * xywh(b)[3],
                "iscrowd": 0,
            }
            for i, (b, c) in enumerate(zip(gold, gold_labels, strict=True))
        ],
    }
    found = [
        {"image_id": 0, "category_id": int(c), "bbox": xywh(b), "score": 1.0}
        for b, c in zip(predicted, labels, strict=True)
        if c in gold_labels
    ]
    return truth, found


def pycocotools_average_precision(
    predicted: Boxes, labels: Labels, gold: Boxes, gold_labels: Labels
) -> tuple[float, float, float]:
    """(map, map50, map75) by pycocotools, on the one area range and detection limit that they are defined by."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = as_coco(predicted, labels, gold, gold_labels)
    if not found:
        return 0.0, 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = truth
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(found), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]

    def mean(values: Boxes) -> float:
        return float(values[values > -1].mean())

    return mean(precision), mean(precision[0]), mean(precision[5])


def math_pair(rng: random.Random) -> tuple[str, str]:
    """(response, gold): plain numbers and words that are equal, nearly equal, or different, in the dressings models use."""

    def number() -> str:
        kind = rng.randrange(6)
        if kind == 0:
            return str(rng.randrange(-20, 100))
        if kind == 1:
            return str(rng.randrange(10**9))
        if kind == 2:
            return f"{rng.randrange(-50, 50)}.{rng.randrange(10 ** rng.randrange(1, 7))}"
        if kind == 3:
            return f"{rng.randrange(100):03d}"
        if kind == 4:
            return f"{rng.randrange(10)}.{'0' * rng.randrange(1, 6)}"
        return f"{rng.randrange(3)}.{rng.randrange(1000):03d}{rng.choice(['', '0', '001'])}"

    def word() -> str:
        if rng.random() < 0.6:
            return rng.choice(WORDS)
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(2, 8)))

    if rng.random() < 0.6:
        gold = number()
        found = rng.choice(
            [
                gold,
                number(),
                gold + "0" if "." in gold else gold + ".0",
                gold.lstrip("0") or "0",
                "-" + gold.lstrip("-"),
            ]
        )
        written = rng.choice([gold, f"\\boxed{{{gold}}}"])
    else:
        gold = word()
        found = rng.choice([gold, gold.upper(), gold.capitalize(), word(), "".join(rng.sample(gold, len(gold)))])
        written = f"\\boxed{{{gold}}}"
    dressing = rng.choice(
        [
            "\\boxed{%s}",
            "<think>so</think><answer>\\boxed{%s}</answer>",
            "$\\boxed{%s}$",
            "with \\(x=1\\) we get \\boxed{%s}.",
            "The final answer is $\\boxed{%s}$",
        ]
    )
    return dressing % found, written


WORDS = [
    "and",
    "or",
    "info",
    "inf",
    "sqrt",
    "percent",
    "pct",
    "sin",
    "cos",
    "log",
    "ln",
    "lim",
    "exp",
    "pi",
    "infinity",
    "alpha",
    "delta",
    "theta",
    "max",
    "min",
    "gcd",
    "mod",
    "dog",
    "god",
    "cat",
    "act",
    "yes",
    "no",
    "true",
    "false",
    "stop",
    "exit",
    "open",
    "closed",
    "taxi",
    "hotel",
    "coffee",
    "unit",
    "meter",
    "degree",
    "feet",
    "student",
    "red",
    "green",
    "blue",
    "east",
    "west",
    "north",
    "south",
    "monday",
    "friday",
    "apple",
    "orange",
    "integer",
    "digit",
    "point",
    "none",
    "hello",
    "world",
    "text",
    "box",
    "frac",
    "sum",
    "prod",
    "int",
    "dx",
    "dy",
    "edx",
    "die",
    "dad",
    "add",
    "bad",
    "one",
    "two",
    "three",
    "four",
    "five",
    "ten",
    "zero",
    "left",
    "right",
    "times",
    "over",
    "cdot",
    "angle",
    "circ",
    "rm",
    "bf",
    "it",
    "mathrm",
    "boxed",
    "choose",
    "binom",
    "det",
    "rank",
    "tr",
    "re",
    "im",
    "arg",
    "norm",
    "abs",
    "floor",
    "ceil",
    "sec",
    "csc",
    "cot",
    "tan",
    "sinh",
    "cosh",
    "arcsin",
]


def math_pairs(num_pairs: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """`num_pairs` of math_pair, by seed."""
    rng = random.Random(seed)
    return (math_pair(rng) for _ in range(num_pairs))


def library_verdict(response: str, gold: str) -> bool | None:
    """math-verify's own verdict, called as the rewards are defined; None where it cannot read the gold answer."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    golds = math_verify.parse(gold, extraction_mode="first_match", parsing_timeout=None)
    if not golds:
        return None
    targets = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    return bool(
        math_verify.verify(golds, math_verify.parse(response, targets, parsing_timeout=None), timeout_seconds=None)
    )


FRAGMENTS = [
    *("<answer>", "</answer>", "<think>", "</think>", "[", "]", "{", "}", ":", ",", "\n", " ", "\\", "'", '"', "\x00"),
    *("'bbox_2d'", '"bbox_2d"', "bbox_2d", "'label'", '"label"', "'cat'", '"dog"', "[1, 2, 3, 4]", "```json", "```"),
    *(
        "1e308",
        "-1e308",
        "NaN",
        "Infinity",
        "1e999",
        "0",
        "42",
        "3.5",
        "A",
        "B.",
        "answer: ",
        "10:20",
        "[[1,2],[3,4],[5,6]]",
    ),
    *("\\boxed{", "\\frac{1}{2}", "$", "\\(", "\\[", "\u202e", "\uff14", "\U0001f600", "[" * 50, "{" * 50),
]


def fuzzed_response(rng: random.Random) -> str:
    """Fragments of every answer format, strung together at random, sometimes inside a sound answer."""
    text = "".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(30)))
    if rng.random() < 0.4:
        sound = "<think>\n</think>\n<answer>\n[{'bbox_2d': [10, 20, 30, 40], 'label': 'cat'}]\n</answer>"
        cut = rng.randrange(len(sound))
        text = sound[:cut] + text + sound[cut + rng.randrange(3) :]
    return text

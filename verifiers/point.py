"""Pointing: one point, judged by the box it must fall into or by its distance from the gold point."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import msgspec

from verifiers.answers import AnswerError, final_text, json_value, point_list
from verifiers.frames import FrameError, scale_between
from verifiers.registry import Context, GoldError, Outcome, SpecError, verifier
from verifiers.types import Frame

_TUPLE = re.compile(r"^\(([^()]*)\)$")


class PointParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`inside`: 1 in any gold box. `distance`: 1 − distance/max_distance from the gold point, in the gold's frame, not
    below 0.

    Frames and sizes as for detection rows.
    """

    mode: Literal["inside", "distance"] = "inside"
    max_distance: float | None = None
    frame: Frame | None = None
    gold_frame: Frame = "original_px"
    original_size: tuple[float, float] | None = None
    resized_size: tuple[float, float] | None = None


def _unwrap(value: Any, key: str) -> Any:
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.get(key) if isinstance(value, dict) else value


def read_point(text: str) -> tuple[float, float]:
    """The one point of an answer: [x, y], (x, y) or {"point_2d": [x, y]}. AnswerError for none or several."""
    return point_list([_unwrap(json_value(_TUPLE.sub(r"[\1]", text.strip())), "point_2d")])[0]


def _gold_boxes(gold: str) -> list[tuple[float, float, float, float]]:
    try:
        value = json_value(gold)
        items = value if isinstance(value, list) and value and not isinstance(value[0], int | float) else [value]
        boxes = msgspec.convert([_unwrap(item, "bbox_2d") for item in items], list[tuple[float, float, float, float]])
    except (AnswerError, msgspec.ValidationError) as error:
        raise GoldError(f"the gold answer {gold[:80]!r} holds no box") from error
    if not boxes or not all(x1 <= x2 and y1 <= y2 for x1, y1, x2, y2 in boxes):
        raise GoldError(f"the gold answer {gold[:80]!r} holds an inverted box, or none")
    return boxes


def _gold_point(gold: str) -> tuple[float, float]:
    try:
        return read_point(gold)
    except AnswerError as error:
        raise GoldError(f"the gold answer {gold[:80]!r} is no point") from error


@verifier("point")
class Point:
    """Accuracy of one predicted point."""

    is_bounded = True

    def score(self, response: str, gold: str, params: PointParams, context: Context) -> Outcome:
        boxes = _gold_boxes(gold) if params.mode == "inside" else []
        target = _gold_point(gold) if params.mode == "distance" else (0.0, 0.0)
        scale = self._scale(params, context)
        try:
            x, y = read_point(final_text(response))
        except AnswerError as error:
            return Outcome(0.0, status="bad_answer", reason=str(error))
        x, y = x * scale[0], y * scale[1]
        if params.mode == "inside":
            return Outcome(float(any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes)))
        distance = math.hypot(x - target[0], y - target[1])
        return Outcome(max(0.0, 1.0 - distance / (params.max_distance or 1.0)), {"distance": distance})

    def check(self, gold: str, params: PointParams, context: Context) -> str | None:
        """`distance` needs a positive max_distance, and frames their sizes."""
        self._scale(params, context)
        if params.mode == "distance" and not (params.max_distance or 0.0) > 0.0:
            return "point with mode 'distance' needs verifier_parm.max_distance > 0"
        return None

    def gold_response(self, gold: str, params: PointParams, context: Context) -> str:
        """The middle of the first box, or the gold point, in the frame expected of predictions."""
        scale = self._scale(params, context)
        x, y = _gold_point(gold) if params.mode == "distance" else self._middle(gold)
        return f"[{x / scale[0]}, {y / scale[1]}]"

    def _middle(self, gold: str) -> tuple[float, float]:
        x1, y1, x2, y2 = _gold_boxes(gold)[0]
        return (x1 + x2) / 2, (y1 + y2) / 2

    def _scale(self, params: PointParams, context: Context) -> tuple[float, float]:
        source = params.frame or context.options.frame
        try:
            return scale_between(source, params.gold_frame, params.original_size, params.resized_size) or (1.0, 1.0)
        except FrameError as error:
            raise SpecError(str(error)) from error

"""Pointing: one point, judged by the box it must fall into or by its distance from the gold point."""

import math
import re
from typing import Any, Literal

import msgspec

from verifiers.answers import final_text, json_value, point_list, read_gold
from verifiers.kinds.coordinate_frames import FramedParams, Size, frame_in_force
from verifiers.registry import AnswerError, Context, GoldError, Outcome, verifier

_TUPLE = re.compile(r"^\(([^()]*)\)$")


class PointParams(FramedParams, frozen=True):
    """`inside`: 1 in any gold box. `distance`: 1 − distance/max_distance from the gold point, in the gold's frame, not below 0."""

    mode: Literal["inside", "distance"] = "inside"
    max_distance: float | None = None


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


@verifier("point")
class Pointing:
    """Accuracy of one predicted point."""

    is_bounded = True

    def score(self, response: str, gold: str, params: PointParams, context: Context) -> Outcome:
        boxes = _gold_boxes(gold) if params.mode == "inside" else []
        target = read_gold(read_point, gold, "point") if params.mode == "distance" else (0.0, 0.0)
        scale = _scale(params, context)
        x, y = read_point(final_text(response))
        x, y = x * scale[0], y * scale[1]
        if params.mode == "inside":
            return Outcome(float(any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes)))
        distance = math.hypot(x - target[0], y - target[1])
        return Outcome(max(0.0, 1.0 - distance / (params.max_distance or 1.0)), {"distance": distance})

    def check(self, gold: str, params: PointParams, context: Context) -> str | None:
        """`distance` needs a positive max_distance, and frames their sizes."""
        _scale(params, context)
        if params.mode == "distance" and not (params.max_distance or 0.0) > 0.0:
            return "point with mode 'distance' needs verifier_parm.max_distance > 0"
        return None

    def gold_response(self, gold: str, params: PointParams, context: Context) -> str:
        """The middle of the first box, or the gold point, in the frame expected of predictions."""
        scale = _scale(params, context)
        if params.mode == "distance":
            x, y = read_gold(read_point, gold, "point")
        else:
            x1, y1, x2, y2 = _gold_boxes(gold)[0]
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
        return f"[{x / scale[0]}, {y / scale[1]}]"


def _scale(params: PointParams, context: Context) -> Size:
    return params.scale(frame_in_force(context), "original_px", context.image_sizes)

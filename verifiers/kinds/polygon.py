"""Segmentation by polygon: intersection over union of two areas, by shapely. Runs in a worker: GEOS is C code on model output."""

from functools import partial
from typing import Any

import msgspec

from verifiers.answers import final_text, json_value, point_list, read_gold
from verifiers.registry import AnswerError, Context, Outcome, verifier


class PolygonParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An answer of more than `max_vertices` corners is a bad answer."""

    max_vertices: int = 1_000


def read_polygon(text: str, max_vertices: int) -> Any:
    """A shapely polygon from [[x, y], …] or {"polygon": [[x, y], …]}; a self-crossing ring covers what GEOS's make_valid says.

    AnswerError for anything else, for fewer than three or too many corners, and for no area.
    """
    # shapely is needed here only.
    import shapely

    value = json_value(text)
    points = point_list(value.get("polygon") if isinstance(value, dict) else value)
    if not 3 <= len(points) <= max_vertices:
        raise AnswerError(f"{len(points)} corners; a polygon here has 3 to {max_vertices}")
    area = shapely.make_valid(shapely.Polygon(points))
    if not 0.0 < area.area < float("inf"):
        raise AnswerError("the polygon has no area")
    return area


@verifier("polygon")
class Polygon:
    """Accuracy: the IoU of the predicted and the gold polygon."""

    def score(self, response: str, gold: str, params: PolygonParams, context: Context) -> Outcome:
        expected = read_gold(partial(read_polygon, max_vertices=max(params.max_vertices, 10_000)), gold, "polygon")
        found = read_polygon(final_text(response), params.max_vertices)
        shared = found.intersection(expected).area
        overlap = shared / (found.area + expected.area - shared)
        return Outcome(min(1.0, max(0.0, overlap)), {"iou": overlap})

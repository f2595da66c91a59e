"""Whether gold boxes lie where their rows say: within the picture, in the frame in force, corners in order.

Their verifier cannot tell: it compares a gold answer with itself. One row shows little, so that what looks strange is told per source.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from verifiers import RewardSpec
from verifiers.tags import answer_text

_MANY_BOXES = 20
"""From so many on it is no chance that all end below 1000 on pictures that are wider."""
_WIDE_PX = 1250
_MANY_OUTSIDE = 0.05
"""Share of boxes outside from which on another frame is suspected, not single slips."""


Corners = tuple[float, float, float, float]


class _Box(msgspec.Struct):
    bbox_2d: Corners
    label: str = ""


def corners(reward: RewardSpec) -> list[Corners]:
    """Of each gold box, as written; none where there are none, of another layout, or unreadable ones."""
    return [box for _, box in labelled(reward)]


def labelled(reward: RewardSpec) -> list[tuple[str, Corners]]:
    """`corners`, each with the label of its box."""
    if reward.verifier != "detection" or (reward.verifier_parm or {}).get("gold_layout", "xyxy") != "xyxy":
        return []
    tagged = answer_text(reward.gold)
    text = (reward.gold if tagged is None else tagged).strip()
    text = f"[{text}]" if text[:1] == "{" else text
    try:
        boxes = msgspec.json.decode(text if '"' in text else text.replace("'", '"'), type=list[_Box])
    except (msgspec.DecodeError, RecursionError):
        return []
    return [(box.label, box.bbox_2d) for box in boxes]


def box_problem(boxes: Sequence[Corners]) -> str | None:
    """Why a row with these gold boxes cannot be trained on; None where it can."""
    for box in boxes:
        x1, y1, x2, y2 = box
        if x2 < x1 or y2 < y1:
            axis = "x2 < x1" if x2 < x1 else "y2 < y1"
            return (
                f"the gold box {list(box)} has {axis}: two corners [x1, y1, x2, y2] are read, top left first; of x, y, width, height "
                "write [x, y, x + width, y + height]"
            )
        if x1 == x2 or y1 == y2:
            return f"the gold box {list(box)} has no area, so that no answer overlaps it; mend or remove it"
    return None


def gold_frame(parm: Mapping[str, Any] | None) -> str:
    """The frame of a row's gold boxes."""
    parm = parm or {}
    return str(parm.get("gold_frame") or ("norm_1000" if parm.get("det_verifier_normalized") else "original_px"))


class BoxCensus:
    """The gold boxes of one source in one frame, as far as they lie outside of their pictures or another frame explains them better."""

    def __init__(self, frame: str) -> None:
        self.frame = frame
        self.num_boxes = self.num_outside = self.num_wide = 0
        self.largest = 0.0
        self.do_fit_swapped = True
        """All boxes outside lie inside with x and y exchanged."""

    def add(self, boxes: Sequence[Corners], size: tuple[int, int]) -> str | None:
        """Count the boxes of a row, on a picture of this displayed size; a note where one of them lies outside."""
        width, height = {"norm_1": (1.0, 1.0), "norm_1000": (1000.0, 1000.0)}.get(self.frame, size)
        note = None
        for box in boxes:
            self.num_boxes += 1
            self.num_wide += max(size) >= _WIDE_PX
            self.largest = max(self.largest, *box)
            if self.frame != "resized_px" and not self._is_inside(box, width, height):
                self.num_outside += 1
                self.do_fit_swapped &= self._is_inside(box, height, width)
                extent = f"{width:g}x{height:g}"
                note = (
                    note or f"the gold box {list(box)} reaches outside its picture, {extent} in the frame {self.frame}"
                )
        return note

    def _is_inside(self, box: Corners, width: float, height: float) -> bool:
        slack = 1e-3 if self.frame == "norm_1" else 1.0
        return min(box) >= -slack and box[2] <= width + slack and box[3] <= height + slack

    def remark(self) -> str | None:
        """What all boxes together say, with what to do; None where they are as they should be."""
        cure = self._cure() if self.num_boxes else None
        return cure and (
            f"{self.num_boxes} gold boxes in the frame {self.frame}, {self.num_outside} of them outside their pictures, no coordinate "
            f"above {self.largest:g}: {cure}"
        )

    def _cure(self) -> str | None:
        is_often_outside = self.num_outside > _MANY_OUTSIDE * self.num_boxes
        if self.frame != "norm_1" and self.largest <= 1.0:
            return "these are fractions, it seems; then say verifier_parm.gold_frame: norm_1"
        if self.num_outside and self.do_fit_swapped:
            return "those outside fit with x and y exchanged; write x first, and the boxes of a turned photo as it is displayed"
        if self.frame == "original_px":
            is_crowd = self.num_boxes >= _MANY_BOXES and self.num_wide > self.num_boxes / 2
            if self.largest <= 1000.0 and (is_often_outside or is_crowd):
                return "these are thousandths, it seems; then say verifier_parm.gold_frame: norm_1000"
        elif is_often_outside:
            return "these are pixels, it seems; then say verifier_parm.gold_frame: original_px"
        return "clip those outside to the picture as it is displayed, or correct them" if self.num_outside else None

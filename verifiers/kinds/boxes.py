"""From an answer's text to its boxes, by JSON or by what can be recovered of broken JSON.

Well-formed JSON (double or single quotes) takes one typed decode. Everything else (prose around, a truncated tail, odd items) goes
through a scan that is linear in the text and uses no recursion, so that no nesting depth can hurt it.
"""

import math
import re
from functools import lru_cache
from typing import Literal

import msgspec
from msgspec.structs import replace

from verifiers.answers import without_fence
from verifiers.registry import GoldError
from verifiers.tags import answer_text

# A list of four numbers is far shorter; longer ones are not read.
MAX_LIST_CHARS = 512
# An item is a box and a label; a longer one is dropped, which keeps the search for its label short.
MAX_ITEM_CHARS = 4_096


class Box(msgspec.Struct, frozen=True, gc=False):
    """One item of an answer, as written: corners (x1, y1, x2, y2) in whatever frame the row says, and a label."""

    bbox_2d: tuple[float, float, float, float]
    label: str


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What the answer tags held: corners, whatever the layout they were written in."""

    boxes: list[Box]
    is_empty_list: bool = False
    """A literal `[]`, which is an answer; nothing recovered from rubbish is none."""
    num_inverted: int = 0
    """Items left out since x2 < x1 or y2 < y1."""


Layout = Literal["xyxy", "yxyx", "xywh"]
Four = tuple[float, float, float, float]

_decode_boxes = msgspec.json.Decoder(list[Box]).decode
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_LIST = re.compile(r"[\"']?\s*:\s*([\[(])")
_LABEL = re.compile(
    r"[\"']label[\"']\s*:\s*(?:\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'(?=\s*[,}])|'([^\n]*?)'(?=\s*}))", re.DOTALL
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


def as_xyxy(values: Four, layout: Layout) -> Four:
    """Corners (x1, y1, x2, y2) from four numbers as `layout` orders them."""
    a, b, c, d = values
    if layout == "yxyx":
        return b, a, d, c
    return (a, b, a + c, b + d) if layout == "xywh" else values


def from_xyxy(corners: Four, layout: Layout) -> Four:
    """The inverse of `as_xyxy`."""
    x1, y1, x2, y2 = corners
    return (x1, y1, x2 - x1, y2 - y1) if layout == "xywh" else as_xyxy(corners, layout)


def is_valid(box: Box) -> bool:
    """Four finite numbers with x1 ≤ x2 and y1 ≤ y2."""
    x1, y1, x2, y2 = box.bbox_2d
    return x1 <= x2 and y1 <= y2 and all(map(math.isfinite, box.bbox_2d))


def parse_boxes(text: str, layout: Layout = "xyxy") -> Answer:
    """Boxes in the text of an answer, in order, valid ones only. Raises nothing, whatever the text."""
    text = without_fence(text)
    is_json = text[:1] == "["
    try:
        boxes = _decode_boxes(text if '"' in text else text.replace("'", '"')) if is_json else recover_boxes(text)
    except (msgspec.DecodeError, RecursionError):
        is_json, boxes = False, recover_boxes(text)
    if layout != "xyxy":
        boxes = [replace(box, bbox_2d=as_xyxy(box.bbox_2d, layout)) for box in boxes]
    # Plain comparisons first: most answers have nothing to leave out.
    for box in boxes:
        x1, y1, x2, y2 = box.bbox_2d
        if not (x1 <= x2 and y1 <= y2):
            valid = [box for box in boxes if is_valid(box)]
            return Answer(valid, False, len(boxes) - len(valid))
    return Answer(boxes, is_json and not boxes)


def recover_boxes(text: str) -> list[Box]:
    """Every complete item of broken JSON, four finite numbers and a label, found by its
    `bbox_2d` key; one without its closing brace is dropped.

    A closing brace in a label, and an opening one in a label that stands before its box, is taken for the item's own.
    """
    found: list[Box] = []
    items_end = 0
    key = text.find("bbox_2d")
    while key >= 0:
        # A longer item is refused, so that looking back any further is in vain.
        item_start = text.rfind("{", max(items_end, key - MAX_ITEM_CHARS), key)
        searched = key + len("bbox_2d")
        opening = _LIST.match(text, searched)
        if opening and item_start >= 0:
            list_end = text.find("]" if opening[1] == "[" else ")", opening.end(), opening.end() + MAX_LIST_CHARS)
            closing = text.find("}", list_end) if list_end >= 0 else 0
            if closing < 0:
                break
            if list_end >= 0:
                box = _read_item(text[opening.end() : list_end], text[item_start : closing + 1])
                if box is not None:
                    found.append(box)
                searched = items_end = closing + 1
        key = text.find("bbox_2d", searched)
    return found


def _read_item(numbers: str, item: str) -> Box | None:
    parts = [part.strip() for part in numbers.strip(" [(").split(",")]
    if len(parts) != 4 or len(item) > MAX_ITEM_CHARS or not all(map(_NUMBER.fullmatch, parts)):
        return None
    label = _LABEL.search(item)
    if label is None:
        return None
    x1, y1, x2, y2 = map(float, parts)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return None
    return Box((x1, y1, x2, y2), _unescape(next(group for group in label.groups() if group is not None)))


def _unescape(raw: str) -> str:
    if "\\" not in raw:
        return raw
    try:
        return msgspec.json.decode(f'"{raw}"', type=str)
    except msgspec.DecodeError:
        return _ESCAPE.sub(r"\1", raw)


class GoldBoxes(msgspec.Struct, frozen=True, gc=False):
    """A gold answer, ready for the kernels: flat coordinates, four per box, and labels."""

    coordinates: list[float]
    labels: list[str]
    is_whole: bool
    """Whether all coordinates are whole numbers."""


@lru_cache(maxsize=65_536)
def gold_boxes(gold: str, layout: Layout = "xyxy") -> GoldBoxes:
    """The boxes of a gold answer (JSON, either quotes, with or without answer tags).

    GoldError where an item of it cannot be read: gold answers are data, not model output, and nothing of them is dropped.
    """
    tagged = answer_text(gold)
    text = (gold if tagged is None else tagged).strip()
    if text[:1] == "{":
        text = f"[{text}]"
    try:
        boxes = _decode_boxes(text if '"' in text else text.replace("'", '"'))
    except (msgspec.DecodeError, RecursionError):
        boxes = recover_boxes(text)
        if not boxes or len(boxes) != text.count("bbox_2d"):
            raise GoldError(f"the gold answer is no list of boxes with labels: {gold[:200]!r}") from None
    values: list[float] = []
    for index, box in enumerate(boxes):
        corners = as_xyxy(box.bbox_2d, layout)
        if not (corners[0] <= corners[2] and corners[1] <= corners[3]):
            raise GoldError(
                f"the gold's box {index} is {list(box.bbox_2d)}, whose end lies before its start as {layout}; "
                f"verifier_parm.gold_layout names another order"
            )
        values += corners
    return GoldBoxes(values, [box.label for box in boxes], all(map(float.is_integer, values)))

"""From a response's text to its boxes: the last pair of answer tags, then JSON, then what can be recovered from broken
JSON.

Well-formed JSON (double or single quotes) takes one typed decode. Everything else (code fences, prose around, a
truncated tail, odd items) goes through a scan that is linear in the text and uses no recursion, so that no nesting
depth can hurt it.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import msgspec

OPEN, CLOSE = "<answer>", "</answer>"
# A list of four numbers is far shorter; longer ones are not read.
MAX_LIST_CHARS = 512
# An item is a box and a label; a longer one is dropped, which keeps the search for its label short.
MAX_ITEM_CHARS = 4_096


class Box(msgspec.Struct, frozen=True, gc=False):
    """One item of an answer, as written: corners (x1, y1, x2, y2) in whatever frame the row says, and a label."""

    bbox_2d: tuple[float, float, float, float]
    label: str


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What the answer tags held. `is_empty_list` is true for a literal `[]` only: nothing recovered from rubbish is not
    an answer.
    """

    boxes: list[Box]
    is_empty_list: bool = False


_decode_boxes = msgspec.json.Decoder(list[Box]).decode
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_LIST = re.compile(r"[\"']?\s*:\s*([\[(])")
_LABEL = re.compile(
    r"[\"']label[\"']\s*:\s*(?:\"((?:[^\"\\]|\\.)*)\"|'((?:[^'\\]|\\.)*)'(?=\s*[,}])|'([^\n]*?)'(?=\s*}))", re.DOTALL
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_FENCE = re.compile(r"^```[a-zA-Z]*\s*|\s*```$")


def answer_text(response: str) -> str | None:
    """What stands between the last pair of answer tags; without a closed pair, what follows the last opening tag; else
    None.
    """
    close = response.rfind(CLOSE)
    start = response.rfind(OPEN, 0, close) if close >= 0 else -1
    if start >= 0:
        return response[start + len(OPEN) : response.find(CLOSE, start)]
    start = response.rfind(OPEN)
    return response[start + len(OPEN) :] if start >= 0 else None


def is_valid(box: Box) -> bool:
    """Four finite numbers with x1 ≤ x2 and y1 ≤ y2."""
    x1, y1, x2, y2 = box.bbox_2d
    return x1 <= x2 and y1 <= y2 and all(map(math.isfinite, box.bbox_2d))


def parse_boxes(text: str) -> Answer:
    """Boxes in the text of an answer, in order, valid ones only. Raises nothing, whatever the text."""
    text = text.strip()
    if text.startswith("```"):
        text = _FENCE.sub("", text)
    if text[:1] == "[":
        try:
            boxes = _decode_boxes(text if '"' in text else text.replace("'", '"'))
        except (msgspec.DecodeError, RecursionError):
            return Answer(recover_boxes(text))
        # The decoder refuses numbers outside a double's range, so only the order of corners is left to check.
        for box in boxes:
            corners = box.bbox_2d
            if corners[0] > corners[2] or corners[1] > corners[3]:
                return Answer([box for box in boxes if is_valid(box)])
        return Answer(boxes, not boxes)
    return Answer(recover_boxes(text))


def recover_boxes(text: str) -> list[Box]:
    """Every complete, valid item of broken JSON, found by its `bbox_2d` key. An item without its closing brace is
    dropped. A closing brace in a label, and an opening one in a label that stands before its box, is taken for the item's own.
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
    box = Box((x1, y1, x2, y2), _unescape(next(group for group in label.groups() if group is not None)))
    return box if is_valid(box) else None


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


@lru_cache(maxsize=65_536)
def gold_boxes(gold: str) -> GoldBoxes | None:
    """The boxes of a gold answer (JSON, either quotes, with or without answer tags); None where an item of it cannot be
    read.

    Gold answers are data, not model output: nothing is recovered or dropped.
    """
    text = answer_text(gold)
    text = (gold if text is None else text).strip()
    if text[:1] == "{":
        text = f"[{text}]"
    try:
        boxes = _decode_boxes(text if '"' in text else text.replace("'", '"'))
    except (msgspec.DecodeError, RecursionError):
        boxes = recover_boxes(text)
        if not boxes or len(boxes) != text.count("bbox_2d"):
            return None
    if not all(map(is_valid, boxes)):
        return None
    return GoldBoxes([value for box in boxes for value in box.bbox_2d], [box.label for box in boxes])

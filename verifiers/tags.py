"""Tagged answers: what stands in their tags, and their format reward, R_fmt of the paper (Eq. 4) or the release's stricter one."""

import re
from typing import Literal

OPEN, CLOSE = "<answer>", "</answer>"
TAGS = ("<think>", "</think>", OPEN, CLOSE)
_LINES = tuple(re.compile(rf"(?:^|\n){tag}(?:\n|$)") for tag in TAGS)


def tag_format(response: str, kind: Literal["tags", "tags_with_newlines"]) -> float:
    """0.25 for each of the four tags that occurs exactly once; with newlines, only where it also has a line to itself."""
    once = [response.count(tag) == 1 for tag in TAGS]
    if kind == "tags_with_newlines":
        once = [single and line.search(response) is not None for single, line in zip(once, _LINES, strict=True)]
    return 0.25 * sum(once)


def conclusion(response: str) -> str:
    """What follows the last `</think>`; where nothing does, what stands before it; without the tag, the response. An opening
    `<think>` in it ends a line, so that the tag is no part of an answer."""
    end = response.rfind(TAGS[1])
    read = response
    if end >= 0:
        after = response[end + len(TAGS[1]) :]
        read = after if after.strip() else response[:end]
    return read.replace(TAGS[0], "\n")


def answer_text(response: str) -> str | None:
    """Between the last pair of answer tags; without a closed pair, what follows the last opening tag; without that, None."""
    close = response.rfind(CLOSE)
    start = response.rfind(OPEN, 0, close) if close >= 0 else -1
    if start >= 0:
        return response[start + len(OPEN) : response.find(CLOSE, start)]
    start = response.rfind(OPEN)
    return response[start + len(OPEN) :] if start >= 0 else None

"""The format reward of tagged answers: R_fmt of the paper (Eq. 4), and the release's stricter variant."""

from __future__ import annotations

import re
from typing import Literal

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LINES = tuple(re.compile(rf"(?:^|\n){tag}(?:\n|$)") for tag in TAGS)


def tag_format(response: str, kind: Literal["tags", "tags_with_newlines"]) -> float:
    """0.25 for each of the four tags that occurs exactly once; with newlines, only where it also has a line to itself."""
    once = [response.count(tag) == 1 for tag in TAGS]
    if kind == "tags_with_newlines":
        once = [single and line.search(response) is not None for single, line in zip(once, _LINES, strict=True)]
    return 0.25 * sum(once)


def tagged_text(response: str) -> str:
    """The text a verifier reads an answer from: inside the last pair of answer tags, the whole response where there is
    none.
    """
    close = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, close) if close >= 0 else response.rfind("<answer>")
    if start < 0:
        return response.strip()
    end = response.find("</answer>", start)
    return response[start + len("<answer>") : end if end >= 0 else None].strip()

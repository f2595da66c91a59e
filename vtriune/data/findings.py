"""What the checks say of rows, and how it is told: one line per reason, with how many rows it concerns and which come first."""

import itertools
import re
from collections.abc import Sequence

import msgspec

from vtriune.data.measures import Measures

_NUM_NAMED = 5
"""Rows that a line names."""
_NUM_REASONS = 20
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|b'[^']*'|\[[^\]]*\]|[-+]?\d[\d.]*(?:e-?\d+)?")
"""What may differ between two rows of one reason: quoted text, lists, numbers."""


class Finding(msgspec.Struct, frozen=True):
    """Of one row."""

    problems: list[str]
    """Reasons why it cannot be trained on; empty for a good one."""
    notes: list[str] = []
    """What is done to a good one, or looks strange about it."""
    measures: Measures | None = None
    """Of a good one."""


class Tally:
    """Counts rows by reason. Reasons that differ in quoted texts, lists and numbers alone are one, told in the first row's words."""

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._places: dict[str, list[tuple[str, int]]] = {}
        self._counts: dict[str, int] = {}

    def add(self, reason: str, file: str, row: int) -> None:
        """Another row of this reason."""
        kind = _PARTICULARS.sub("…", reason)
        self._reasons.setdefault(kind, reason)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        places = self._places.setdefault(kind, [])
        if len(places) < _NUM_NAMED:
            places.append((file, row))

    def lines(self) -> list[str]:
        """In the order in which reasons first came: `FILE, row 3: REASON`, `7 rows (FILE, rows 3, 5, … and 2 more): REASON`."""
        lines = [self._line(kind) for kind in self._reasons]
        num_more = len(lines) - _NUM_REASONS
        return lines if num_more <= 0 else [*lines[:_NUM_REASONS], f"… and {num_more} more reasons"]

    def _line(self, kind: str) -> str:
        reason, places, count = self._reasons[kind], self._places[kind], self._counts[kind]
        if count == 1:
            return f"{_named(places)}: {reason}"
        more = f" and {count - len(places)} more" if count > len(places) else ""
        return f"{count} rows ({_named(places)}{more}): {reason}"


def _named(places: Sequence[tuple[str, int]]) -> str:
    by_file = [
        (file, [row for _, row in of_file]) for file, of_file in itertools.groupby(places, lambda place: place[0])
    ]
    return "; ".join(f"{file}, row{'s' * (len(rows) > 1)} {', '.join(map(str, rows))}" for file, rows in by_file)

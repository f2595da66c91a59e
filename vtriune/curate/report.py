"""What a curation kept and dropped: counts by rule and source, and examples of what each rule dropped, with their pictures."""

import html
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from vtriune import whole_files
from vtriune.curate.balance import BALANCES
from vtriune.curate.rules import RULES, Candidate
from vtriune.data.page import HEAD, section
from vtriune.data.store import Store

_NUM_EXAMPLES = 4


class Dropped(NamedTuple):
    """A row that went, and the rule that dropped it."""

    rule: str
    candidate: Candidate


class _Asked(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def parameter(self) -> float: ...


def write_report(
    path: Path, asked: Sequence[_Asked], dropped: Sequence[Dropped], store: Store, kept: Sequence[Candidate]
) -> Path:
    """One HTML file. Returns `path`."""
    parts = [HEAD, f"<h1>{len(kept)} of {len(kept) + len(dropped)} rows kept</h1>", *_counts(asked, dropped, kept)]
    for each in asked:
        rows = [one.candidate.sample.row for one in dropped if one.rule == each.name]
        about = RULES[each.name].about if each.name in RULES else BALANCES[each.name][0]
        told = f"{each.name}: {with_parameter(about, each.parameter)}: {len(rows)} rows"
        parts.append(f"<h2>{html.escape(told)}</h2>")
        parts += [section(store, row) for row in rows[:_NUM_EXAMPLES]]
    whole_files.write(path, "".join(parts).encode())
    return path


def with_parameter(about: str, parameter: float) -> str:
    """What a rule drops, with its X."""
    return f"{about} (X = {parameter:g})" if "X" in about else about


def _counts(asked: Sequence[_Asked], dropped: Sequence[Dropped], kept: Sequence[Candidate]) -> Iterator[str]:
    """A table: a line per source, a column per rule."""
    left = Counter(candidate.sample.source for candidate in kept)
    gone = Counter((one.candidate.sample.source, one.rule) for one in dropped)
    names = [each.name for each in asked]
    yield "<table><tr><th>source</th><th>kept</th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    for source in sorted({*left, *(source for source, _ in gone)}):
        cells = "".join(f"<td>{gone[source, name]}</td>" for name in names)
        yield f"<tr><td>{html.escape(source)}</td><td>{left[source]}</td>{cells}</tr>"
    yield "</table>"

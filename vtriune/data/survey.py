"""What is in a set of rows, source by source: the tables of `vtriune.data check` and of `launch --dry-run`.

Rows count once, however often their file is shown in an epoch.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from rich.table import Table

from vtriune.data import measures
from vtriune.data.measures import Look, Measures, quartiles, same_pictures
from vtriune.data.store import Store


class Measured(NamedTuple):
    """A stored row, with what the store says of it."""

    source: str
    verifier: str
    sample_id: str
    measures: Measures


class SourceSurvey:
    """Rows of one source."""

    def __init__(self) -> None:
        self.verifiers: Counter[str] = Counter()
        self._ids: Counter[str] = Counter()
        self._rows: list[Measures] = []

    def add(self, row: Measured) -> None:
        """Another row."""
        self.verifiers[row.verifier] += 1
        if row.sample_id:
            self._ids[row.sample_id] += 1
        self._rows.append(row.measures)

    @property
    def num_rows(self) -> int:
        """All of them."""
        return len(self._rows)

    @property
    def looks(self) -> set[Look]:
        """Of all pictures."""
        return {each for row in self._rows for each in row.looks}

    @property
    def num_duplicates(self) -> int:
        """Rows beyond the first with the same question of the same pictures, copies saved anew included."""
        same = same_pictures(self.looks)
        return len(self._rows) - len({(row.question, *(same[each] for each in row.looks)) for row in self._rows})

    @property
    def num_same_ids(self) -> int:
        """Rows beyond the first of their id."""
        return sum(self._ids.values()) - len(self._ids)

    def num_showing(self, looks: Set[Look]) -> int:
        """Rows of which a picture is one of these, or a copy of one."""
        same = same_pictures(looks | self.looks)
        wanted = {same[each] for each in looks}
        return sum(1 for row in self._rows if any(same[each] in wanted for each in row.looks))

    def figures(self, max_prompt_tokens: int | None, num_shown: int | None = None) -> Iterator[tuple[str, str]]:
        """Names and figures, as they stand in the table; `num_shown` is what an epoch shows of the source."""
        is_repeated = num_shown not in (None, self.num_rows)
        yield "rows", f"{self.num_rows:,}" + (f", of which an epoch shows {num_shown:,}" if is_repeated else "")
        yield "verifier", ", ".join(_counted(self.verifiers))
        yield from self._of_pictures()
        if (tokens := [row.prompt_tokens for row in self._rows if row.prompt_tokens is not None]) != []:
            spread = _spread(tokens)
            if max_prompt_tokens is not None:
                near = sum(1 for count in tokens if count > 0.9 * max_prompt_tokens)
                spread += f" of at most {max_prompt_tokens:,}; {_share(near, len(tokens))} within a tenth of that"
            yield "prompt tokens", spread
        yield "gold answer, characters", _spread([row.answer_chars for row in self._rows])
        if (boxes := [row.num_boxes for row in self._rows if row.num_boxes is not None]) != []:
            yield "gold boxes a row", f"{_spread(boxes)}; {sum(boxes):,} in all"
        yield "the same id again", f"{self.num_same_ids:,}"
        yield "the same picture and question again", f"{self.num_duplicates:,}"

    def _of_pictures(self) -> Iterator[tuple[str, str]]:
        sizes = [size for row in self._rows for size in row.sizes]
        per_row = Counter(len(row.sizes) for row in self._rows)
        yield "pictures a row", ", ".join(f"{number} ({count:,})" for number, count in sorted(per_row.items()))
        if not sizes:
            return
        by_area = sorted(sizes, key=lambda size: size[0] * size[1])
        told = (by_area[0], by_area[len(by_area) // 2], by_area[-1])
        yield "picture sizes, px", " · ".join(f"{width}x{height}" for width, height in told)
        seen = [pair for row in self._rows if row.resized for pair in zip(row.sizes, row.resized, strict=True)]
        if seen:
            scales = [(rw * rh) / (w * h) for (w, h), (rw, rh) in seen]
            yield "area for the model, times", " · ".join(f"{scale:.2g}" for scale in quartiles(scales))
        yield "changed on reading", f"{sum(row.num_changed for row in self._rows):,} pictures"


def survey(rows: Iterable[Measured]) -> dict[str, SourceSurvey]:
    """By source, sorted."""
    found: defaultdict[str, SourceSurvey] = defaultdict(SourceSurvey)
    for row in rows:
        found[row.source].add(row)
    return dict(sorted(found.items()))


def survey_store(store: Store) -> dict[str, SourceSurvey]:
    """Of the rows of a store that was built with checks; decodes no picture."""
    rows = zip(store.headers(), measures.read(store.folder), strict=True)
    return survey(
        Measured(header.source, header.reward.verifier, header.sample_id, each)
        for header, each in rows
        if each is not None
    )


def report(stores: Mapping[str, Store], max_prompt_tokens: int | None) -> Iterator[Table | str]:
    """What a terminal shows of stores by split, `train` and `held out`: a table a source, then what held-out rows share with those of
    training. Four figures with dots between are least, median, 95th percentile, largest."""
    surveys = {split: survey_store(store) for split, store in stores.items()}
    for split, sources in surveys.items():
        for source, found in sources.items():
            drawn = Table(title=f"{split}: {source}", title_justify="left", show_header=False)
            for name, figure in found.figures(max_prompt_tokens, stores[split].index.rows_per_source[source]):
                drawn.add_row(name, figure)
            yield drawn
    for source, number in leaks(surveys.get("train", {}), surveys.get("held out", {})).items():
        yield f"held out: {source}: {number} rows show a picture that is trained on too"


def leaks(train: Mapping[str, SourceSurvey], test: Mapping[str, SourceSurvey]) -> dict[str, int]:
    """By held-out source, the rows of which a picture is trained on too."""
    trained_on = set().union(*(each.looks for each in train.values()))
    shared = {source: each.num_showing(trained_on) for source, each in test.items()}
    return {source: number for source, number in shared.items() if number}


def _counted(counts: Counter[str]) -> list[str]:
    if len(counts) == 1:
        return list(counts)
    return [f"{name} ({count:,})" for name, count in counts.most_common()]


def _spread(values: Sequence[float]) -> str:
    return " · ".join(f"{value:,.0f}" for value in quartiles(values))


def _share(number: int, total: int) -> str:
    return f"{number / total:.1%}" if number else "0 %"

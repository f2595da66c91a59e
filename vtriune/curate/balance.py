"""Rules about all rows together: which of them are too many. Pure logic; which rows go is drawn from a seed.

single_to_multi   of detection rows, at most X with one gold box for each with several (the paper: 1 to 2, X = 0.5)
label_tail        a label's rows go where the label is on fewer than X rows
per_answer        of counting rows, at most X with the same answer
per_label         of detection rows, at most X whose first gold box has the same label
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from vtriune.curate.rules import Candidate
from vtriune.data.box_frames import labelled

Picks = Callable[[Sequence[Candidate], float, int], set[int]]
"""(candidates, parameter, seed) → the places of those that go."""


def _single_to_multi(candidates: Sequence[Candidate], ratio: float, seed: int) -> set[int]:
    numbers = [len(labelled(each.sample.reward)) for each in candidates]
    single = [place for place, number in enumerate(numbers) if number == 1]
    num_multi = sum(1 for number in numbers if number > 1)
    # Of data that have single boxes alone, nothing is too many.
    return _surplus(candidates, single, int(ratio * num_multi), seed) if num_multi else set()


def _label_tail(candidates: Sequence[Candidate], least: float, seed: int) -> set[int]:
    by_row = [{label for label, _ in labelled(each.sample.reward)} for each in candidates]
    counts = Counter(label for labels in by_row for label in labels)
    return {place for place, labels in enumerate(by_row) if any(counts[label] < least for label in labels)}


def _per_answer(candidates: Sequence[Candidate], most: float, seed: int) -> set[int]:
    return _at_most(candidates, [each.gold if _is(each, "counting") else None for each in candidates], most, seed)


def _per_label(candidates: Sequence[Candidate], most: float, seed: int) -> set[int]:
    labels = [next((label for label, _ in labelled(each.sample.reward)), None) for each in candidates]
    return _at_most(candidates, labels, most, seed)


BALANCES: dict[str, tuple[str, float, Picks]] = {
    "single_to_multi": ("more than X rows of one gold box for each of several", 0.5, _single_to_multi),
    "label_tail": ("a label that is on fewer than X rows", 10, _label_tail),
    "per_answer": ("more than X counting rows of the same answer", 1000, _per_answer),
    "per_label": ("more than X rows whose first gold box has the same label", 1000, _per_label),
}
"""Name → what goes, the parameter's default, the picks."""


def _is(candidate: Candidate, verifier: str) -> bool:
    return candidate.sample.reward.verifier == verifier


def _at_most(candidates: Sequence[Candidate], keys: Sequence[Hashable], most: float, seed: int) -> set[int]:
    by_key: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        if key is not None:
            by_key[key].append(place)
    return {gone for places in by_key.values() for gone in _surplus(candidates, places, int(most), seed)}


def _surplus(candidates: Sequence[Candidate], places: Sequence[int], most: int, seed: int) -> set[int]:
    """All but `most` of the places, drawn by what the rows are, so that other rows before them change nothing."""
    return set(sorted(places, key=lambda place: _lot(candidates[place], seed))[most:])


def _lot(candidate: Candidate, seed: int) -> tuple[bytes, int]:
    sample = candidate.sample
    told = f"{seed} {sample.source} {sample.sample_id} {sample.prompt[-1].content} {sample.reward.gold}"
    return hashlib.sha256(told.encode()).digest(), sample.row

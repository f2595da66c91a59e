"""What is measured of a row while it is checked: sizes, lengths, and a fingerprint of each picture. Kept beside the store, a line per
stored row, so that a later look at the same data decodes nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from PIL import Image

FILE_NAME = "measures.jsonl"


class Look(NamedTuple):
    """What a picture looks like, at a glance."""

    hash: int
    """64 bits that say where brightness rises from left to right on a grid of 9 x 8 (dHash, Krawetz 2013)."""
    grey: bytes
    """Brightness on a grid of 16 x 16, row by row."""


class Measures(msgspec.Struct, frozen=True, array_like=True):
    """Of one row."""

    sizes: list[tuple[int, int]]
    """Width and height of each picture as displayed, px."""
    resized: list[tuple[int, int]]
    """As the model sees them; empty without a model."""
    num_changed: int
    """Pictures whose pixels are others than those in the file: turned, scaled to 8 bits, laid on white, …"""
    looks: list[Look]
    """Of each picture."""
    prompt_tokens: int | None
    """Image tokens included; None without a model."""
    question: int
    """Hash of the prompt's text."""
    answer_chars: int
    """Length of the gold answer."""
    num_boxes: int | None
    """Gold boxes; None for a verifier without any."""


def look(picture: Image.Image) -> Look:
    """Almost the same for a copy that was scaled or saved anew with loss, as a rule another for another picture."""
    grey = picture.convert("L")
    steps = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = np.packbits(steps[:, 1:] > steps[:, :-1] + LEVEL).tobytes()
    return Look(int.from_bytes(bits, "big"), grey.resize((16, 16), Image.Resampling.BOX).tobytes())


LEVEL = 4
"""Brightness, of 255, within which paper is even: what saving with loss does to it is no rise."""
SAME_BITS = 3
"""Bits in which the hashes of two copies of a picture differ at most; of two photographs a dozen do."""
SAME_GREY = 50
"""Difference in brightness, of 255, in the cell where it is largest, up to which two pictures of near hashes are copies: hashes of
drawings on empty paper are near for different drawings, too. Copies halved and saved at quality 60 differ by up to 44, those of
photographs by 11; two charts of one kind by 59 and more."""
_BAND = 16
_BLOCK = 512


def same_pictures(looks: Iterable[Look]) -> dict[Look, Look]:
    """Each look → one that stands for all copies of its picture."""
    unique = sorted(set(looks))
    group_of = linked(each.hash for each in unique)
    groups = defaultdict(list)
    for each in unique:
        groups[group_of[each.hash]].append(each)
    found: dict[Look, Look] = {}
    for group in groups.values():
        found |= _by_brightness(group)
    return found


def _by_brightness(group: Sequence[Look]) -> dict[Look, Look]:
    """Each look of near hashes → the nearest of those before it that stand for copies, else itself."""
    found: dict[Look, Look] = {}
    firsts: list[Look] = []
    greys = np.empty((len(group), 256), np.int16)
    for each in group:
        grey = np.frombuffer(each.grey, np.uint8).astype(np.int16)
        distances = np.abs(greys[: len(firsts)] - grey).max(axis=1)
        if len(firsts) and distances.min() <= SAME_GREY:
            found[each] = firsts[int(distances.argmin())]
            continue
        greys[len(firsts)] = grey
        firsts.append(each)
        found[each] = each
    return found


def linked(hashes: Iterable[int]) -> dict[int, int]:
    """Each hash → the least one that it is near to, directly or by others in between.

    Hashes that differ in at most SAME_BITS agree in one of four bands of 16, so only those that share a band are compared.
    """
    unique = np.unique(np.fromiter(hashes, np.uint64))
    least = np.arange(len(unique))

    def root(place: int) -> int:
        while least[place] != place:
            least[place] = place = least[least[place]]
        return place

    for shift in range(0, 64, _BAND):
        band = (unique >> np.uint64(shift)) & np.uint64(2**_BAND - 1)
        order = np.argsort(band, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for one, other in _near(unique, run):
                first, second = sorted((root(one), root(other)))
                least[second] = first
    return {int(value): int(unique[root(place)]) for place, value in enumerate(unique)}


def _near(unique: np.ndarray, run: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of places in `run` whose hashes differ in at most SAME_BITS."""
    if len(run) == 1:
        return
    for start in range(0, len(run), _BLOCK):
        block = run[start : start + _BLOCK]
        distances = np.bitwise_count(unique[block][:, None] ^ unique[run][None])
        for row, column in np.argwhere(distances <= SAME_BITS):
            if start + row < column:
                yield int(block[row]), int(run[column])


class Writer:
    """Appends measures to the file of a store in the making."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / FILE_NAME).open("wb")

    def add(self, measures: Measures | None) -> None:
        """Of the next stored row; None where no checks were asked for."""
        self._file.write(msgspec.json.encode(measures) + b"\n")

    def close(self) -> None:
        """All rows are stored."""
        self._file.close()


def read(folder: Path) -> Iterator[Measures | None]:
    """Of every stored row of the store in `folder`, in order."""
    decoder: msgspec.json.Decoder[Measures | None] = msgspec.json.Decoder(Measures | None)
    with (folder / FILE_NAME).open("rb") as file:
        yield from map(decoder.decode, file)


def quartiles(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Least, median, 95th percentile, largest; `values` must not be empty."""
    least, median, high, most = np.percentile(values, [0, 50, 95, 100], method="inverted_cdf")
    return float(least), float(median), float(high), float(most)

"""What is measured of a row while it is checked: sizes, lengths, and a fingerprint of each picture. Kept beside the store, a line per
stored row, so that a later look at the same data decodes nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

FILE_NAME = "measures.jsonl"


class Measures(msgspec.Struct, frozen=True, array_like=True):
    """Of one row."""

    sizes: list[tuple[int, int]]
    """Width and height of each picture as displayed, px."""
    resized: list[tuple[int, int]]
    """As the model sees them; empty without a model."""
    num_changed: int
    """Pictures whose pixels are others than those in the file: turned, scaled to 8 bits, laid on white, …"""
    hashes: list[int]
    """`difference_hash` of each picture."""
    prompt_tokens: int | None
    """Image tokens included; None without a model."""
    question: int
    """Hash of the prompt's text."""
    answer_chars: int
    """Length of the gold answer."""
    num_boxes: int | None
    """Gold boxes; None for a verifier without any."""


def difference_hash(picture: Image.Image) -> int:
    """64 bits that say where brightness rises from left to right on a grid of 9 x 8: the same for a copy that was scaled or saved anew
    with loss, as a rule another for another picture. (dHash, Krawetz 2013.)"""
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


SAME = 3
"""Bits in which the hashes of two copies of a picture differ at most; of two pictures a dozen do."""
_BAND = 16
_BLOCK = 512


def same_pictures(hashes: Iterable[int]) -> dict[int, int]:
    """Each hash → the least one that it is the same picture as, directly or by others in between.

    Hashes that differ in at most SAME bits agree in one of four bands of 16, so only those that share a band are compared.
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
    """Pairs of places in `run` whose hashes differ in at most SAME bits."""
    if len(run) == 1:
        return
    for start in range(0, len(run), _BLOCK):
        block = run[start : start + _BLOCK]
        distances = np.bitwise_count(unique[block][:, None] ^ unique[run][None])
        for row, column in np.argwhere(distances <= SAME):
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

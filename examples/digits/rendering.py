"""Draw a grid of cells with real handwritten digits. Called by the data builder and the warm start.

One cell is 28 x 28 px: the area of one language-model token of Qwen2.5-VL (2 x 2 merged patches of 14 px). A cell holds one
digit at most, so an image token sees exactly one digit, and a digit's box is its cell.
"""

import functools
import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CELL_PX = 28
SCALE = 3  # 8 x 8 digits are drawn 24 x 24 px
MARGIN_PX = 2
BLANK = -1
BAR = -2
SHIFTS_PX = (-1, 0, 1)
INKS = (0.7, 0.85, 1.0)
NUM_VARIANTS = len(SHIFTS_PX) ** 2 * len(INKS)
NUM_HELD_OUT = 360
SPLIT_SEED = 20250518


@dataclass(frozen=True, eq=False)
class DigitPool:
    """The digit images of one split.

    levels: (n, 8, 8) float32 in [0, 1]; by_value[d]: positions of digit d; ids: rows of load_digits.
    """

    split: str
    levels: np.ndarray
    by_value: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...]


@functools.cache
def digit_pool(split: str) -> DigitPool:
    """The 1,437 digits of `train` or the 360 of `test`: disjoint images, the same split for every seed of the builder."""
    if split not in ("train", "test"):
        raise ValueError(f"digit_pool: split is {split!r}; it must be 'train' or 'test'")
    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.target))
    chosen = order[:NUM_HELD_OUT] if split == "test" else order[NUM_HELD_OUT:]
    targets = digits.target[chosen]
    return DigitPool(
        split=split,
        levels=(digits.images[chosen] / 16.0).astype(np.float32),
        by_value=tuple(tuple(np.flatnonzero(targets == value).tolist()) for value in range(10)),
        ids=tuple(chosen.tolist()),
    )


@dataclass(frozen=True)
class CellInk:
    """How one cell is drawn: position of the digit image in its pool (or BLANK, BAR), variant in [0, NUM_VARIANTS)."""

    position: int
    variant: int = 0


def choose_ink(cells: list[list[int]], pool: DigitPool, rng: random.Random) -> list[list[CellInk]]:
    """Pick a digit image, a shift and an ink strength for every cell; values below 0 are BLANK or BAR."""

    def ink(value: int) -> CellInk:
        return CellInk(value) if value < 0 else CellInk(rng.choice(pool.by_value[value]), rng.randrange(NUM_VARIANTS))

    return [[ink(value) for value in row] for row in cells]


@functools.lru_cache(maxsize=65_536)
def draw_cell(ink: CellInk, pool: DigitPool) -> np.ndarray:
    """One cell, (28, 28) uint8, dark ink on white; shared, so read-only."""
    cell = np.full((CELL_PX, CELL_PX), 255, np.uint8)
    if ink.position == BAR:
        cell[MARGIN_PX:-MARGIN_PX, MARGIN_PX:-MARGIN_PX] = 96
    elif ink.position != BLANK:
        strength, shift = divmod(ink.variant, len(SHIFTS_PX) ** 2)
        down, right = (SHIFTS_PX[i] + MARGIN_PX for i in divmod(shift, len(SHIFTS_PX)))
        levels = np.kron(pool.levels[ink.position], np.ones((SCALE, SCALE), np.float32)) * INKS[strength]
        size = levels.shape[0]
        cell[down : down + size, right : right + size] = np.rint(255.0 * (1.0 - levels)).astype(np.uint8)
    cell.flags.writeable = False
    return cell


def draw(inks: list[list[CellInk]], pool: DigitPool) -> np.ndarray:
    """The whole grid, (rows * 28, columns * 28) uint8."""
    return np.concatenate([np.concatenate([draw_cell(ink, pool) for ink in row], axis=1) for row in inks], axis=0)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of a grey image, written as RGB."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(stream, format="PNG", compress_level=1)
    return stream.getvalue()

"""Pictures of things: real handwritten digits at any place, size, aspect and slight rotation, and bars, on textured paper.

A `Thing` knows its ink and its box before anything is drawn: a digit is cut out to the tight box of its ink, and placing it moves the
box. `draw` puts the things on paper. Called by the data builder and the warm start.
"""

import functools
import io
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

BAR = 10
"""The value of a bar; digits have their own, 0 to 9."""
NUM_HELD_OUT = 360
SPLIT_SEED = 20250518
INK_LEVEL = 0.35
"""Share of full ink above which a pixel belongs to a digit."""
FRAME_LEVEL = 90
"""Grey of the one-pixel line around every picture."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class DigitPool:
    """The digit images of one split.

    pictures: 8 x 8 grey images with a blank border of 2 px, ink 255; by_value[d]: positions of digit d; ids: rows of load_digits.
    """

    split: str
    pictures: tuple[Image.Image, ...]
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
    levels = np.pad(np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    return DigitPool(
        split=split,
        pictures=tuple(Image.fromarray(each) for each in levels),
        by_value=tuple(tuple(np.flatnonzero(digits.target[chosen] == value).tolist()) for value in range(10)),
        ids=tuple(chosen.tolist()),
    )


@dataclass(frozen=True, eq=False)
class Thing:
    """A digit or a bar. ink: (height, width) float32 in [0, 1], every edge touched; left, top: px; darkness: grey taken from paper."""

    value: int
    ink: np.ndarray
    left: int
    top: int
    darkness: float

    @property
    def box(self) -> Box:
        """The tight box of the ink in px: x1, y1, x2, y2; x2 and y2 are the first column and row beyond."""
        height, width = self.ink.shape
        return (self.left, self.top, self.left + width, self.top + height)

    @property
    def area(self) -> int:
        """Of the box, px²."""
        return self.ink.size


def cut_out(value: int, height_px: float, pool: DigitPool, rng: random.Random) -> np.ndarray:
    """The ink of a random digit of this value, about `height_px` high, of random aspect and rotation, cropped to its tight box."""
    picture = pool.pictures[rng.choice(pool.by_value[value])]
    stretch, angle = rng.uniform(0.85, 1.4), math.radians(rng.uniform(-12, 12))
    side = math.ceil(height_px * 1.7)
    # One transform from the 12 x 12 picture: rotate around its middle, 8 rows become height_px.
    down, across = 8 / height_px, 8 / (height_px * stretch)
    cos, sin, half = math.cos(angle), math.sin(angle), side / 2
    a, b, d, e = cos * across, sin * across, -sin * down, cos * down
    terms = (a, b, 6 - (a + b) * half, d, e, 6 - (d + e) * half)
    layer = picture.transform((side, side), Image.Transform.AFFINE, terms, Image.Resampling.BICUBIC)
    ink = np.asarray(layer, np.float32) * (1 / 255)
    ink = np.clip((ink - (INK_LEVEL - 0.1)) * 5, 0, 1)  # crisp strokes: half ink at INK_LEVEL
    rows, columns = np.flatnonzero((ink >= 0.5).any(1)), np.flatnonzero((ink >= 0.5).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@dataclass(frozen=True)
class Scene:
    """A picture that is not drawn yet: its size in px and its things."""

    width: int
    height: int
    things: tuple[Thing, ...]


def paper(width: int, height: int, rng: random.Random) -> np.ndarray:
    """Grey paper with soft stains and a line around, (height, width) float32."""
    base, strength = rng.uniform(205, 250), rng.uniform(0, 22)
    coarse = np.frombuffer(rng.randbytes(36), np.uint8).reshape(6, 6)
    stains = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grey = base - strength * (np.asarray(stains, np.float32) * (1 / 255))
    grey[[0, -1], :] = FRAME_LEVEL
    grey[:, [0, -1]] = FRAME_LEVEL
    return grey


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """The picture, (height, width) uint8; later things lie over earlier ones."""
    grey = paper(scene.width, scene.height, rng)
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        grey[y1:y2, x1:x2] *= 1 - thing.darkness * thing.ink
    return np.rint(grey).astype(np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of a grey picture, written as RGB."""
    stream = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def in_thousandths(box: Box, size: Sequence[int]) -> tuple[int, int, int, int]:
    """A box in px as whole thousandths of width and height."""
    width, height = size
    return (
        round(1000 * box[0] / width),
        round(1000 * box[1] / height),
        round(1000 * box[2] / width),
        round(1000 * box[3] / height),
    )


def overlap(box: Box, others: Sequence[Box]) -> float:
    """The largest share of the smaller of two boxes that both cover."""
    largest = 0.0
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        if width > 0 and height > 0:
            areas = ((each[2] - each[0]) * (each[3] - each[1]) for each in (box, other))
            largest = max(largest, width * height / min(areas))
    return largest

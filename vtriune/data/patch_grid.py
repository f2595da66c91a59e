"""How large an image is for the model: resizing to the patch grid and counting its tokens, from the model folder's own figures.

Used by preprocessing and by the checks at load, without loading an image processor: those import torch, torchvision and more, many
seconds of work that only the learner and the engine need.
"""

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from vtriune.data.schema import DataError

_MAX_ASPECT = 200
"""Beyond it Qwen's image processors refuse an image."""


class PatchGrid(msgspec.Struct, frozen=True):
    """Patches of `patch_size` px, `merge_size`² of which become one token; an image's area lies within the pixel bounds."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int

    @property
    def cell_px(self) -> int:
        """Side of the square that becomes one token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels · frames · rows · columns."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) on the grid: scaled by the square-root ratio where the area leaves the bounds, else rounded.

        The rule of Qwen2-VL's processors. Raises DataError for an aspect ratio that they refuse.
        """
        if max(width, height) > _MAX_ASPECT * min(width, height):
            raise DataError(f"image of {width}x{height} px: absolute aspect ratio must be smaller than {_MAX_ASPECT}")
        cell = self.cell_px
        columns, rows = round(width / cell), round(height / cell)
        area_px = columns * rows * cell**2
        if area_px > self.max_pixels:
            # The order of operations is theirs: rounding decides where a side is a whole number of cells.
            beta = math.sqrt((height * width) / self.max_pixels)
            columns, rows = max(1, math.floor(width / beta / cell)), max(1, math.floor(height / beta / cell))
        elif area_px < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            columns, rows = math.ceil(width * beta / cell), math.ceil(height * beta / cell)
        return columns * cell, rows * cell

    def num_tokens(self, width: int, height: int) -> int:
        """Tokens that the image processor makes of an image of this size."""
        columns_px, rows_px = self.size(width, height)
        return columns_px * rows_px // self.cell_px**2


def read_patch_grid(folder: Path, min_pixels: int, max_pixels: int) -> PatchGrid | None:
    """The grid of the model in `folder`; None for a model without vision.

    Raises DataError when a vision model has no image processor beside it, or one of another patch size.
    """
    vision = read_json(folder / "config.json").get("vision_config")
    if vision is None:
        return None
    settings = read_json(folder / "preprocessor_config.json") or read_json(folder / "processor_config.json").get(
        "image_processor"
    )
    if not settings:
        raise DataError(
            f"{folder}: no processor can be loaded (preprocessor_config.json is missing); save the model's processor there"
        )
    grid = PatchGrid(
        settings.get("patch_size", 14),
        settings.get("merge_size", 2),
        settings.get("temporal_patch_size", 2),
        min_pixels,
        max_pixels,
    )
    of_model = (vision.get("patch_size", grid.patch_size), vision.get("spatial_merge_size", grid.merge_size))
    if of_model != (grid.patch_size, grid.merge_size):
        raise DataError(
            f"{folder}: the image processor has patch_size {grid.patch_size} and merge_size {grid.merge_size}, the model "
            f"{of_model[0]} and {of_model[1]}; one of them is of another model"
        )
    return grid


def read_json(path: Path) -> dict[str, Any]:
    """A file of a model folder; empty where there is none."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content

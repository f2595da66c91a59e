"""Coordinate frames, and the way from one to another.

`original_px`: pixels of the image as it lies in the data. `resized_px`: pixels of the image the model saw. `norm_1000`, `norm_1`:
fractions of width and height, times 1000 or 1. Scaling an axis leaves IoU as it is, so a conversion changes no score by itself;
leaving it out where frames differ makes every score wrong.

Frames come from the row or from `rewards.frame`, the sizes they need from the row or from the run, which resizes the images. Neither
ever comes from the response: a model could choose the frame that pays.
"""

from collections.abc import Sequence

import msgspec

from verifiers.kinds.boxes import Box
from verifiers.registry import Context, SpecError
from verifiers.types import Frame, ImageSizes

Size = tuple[float, float]


class FramedParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a row with coordinates may say of their frames."""

    frame: Frame | None = None
    """The predictions'; without it `rewards.frame`."""
    gold_frame: Frame | None = None
    """The gold's; without it `original_px`."""
    original_size: Size | None = None
    """[width, height] of the image in the data; without it what the run knows."""
    resized_size: Size | None = None
    """[width, height] of the image as the model saw it; without it what the run knows."""
    image: int | None = None
    """Which of the row's images the coordinates are in, from 0; needed where their sizes differ and a frame needs one."""

    def scale(self, predicted: Frame, gold: Frame, sizes: ImageSizes) -> Size:
        """Factors (x, y) from the predictions' frame to the gold's, given what they are where the row is silent. SpecError where a
        size is needed and missing."""
        source, target = self.frame or predicted, self.gold_frame or gold
        if source == target:
            return 1.0, 1.0
        (from_width, from_height), (to_width, to_height) = self._extent(source, sizes), self._extent(target, sizes)
        return to_width / from_width, to_height / from_height

    def _extent(self, frame: Frame, sizes: ImageSizes) -> Size:
        """Width and height of the whole image in `frame`."""
        if frame == "norm_1":
            return 1.0, 1.0
        if frame == "norm_1000":
            return 1000.0, 1000.0
        name = "original_size" if frame == "original_px" else "resized_size"
        size: Size | None = getattr(self, name)
        if size is None and sizes:
            if self.image is None and len(set(sizes)) > 1:
                raise SpecError(
                    f"the row has {len(sizes)} images of different size and frame {frame!r} needs one: "
                    f"verifier_parm.image says which, from 0"
                )
            index = self.image or 0
            if not 0 <= index < len(sizes):
                raise SpecError(f"verifier_parm.image is {index}, and the row has {len(sizes)} images")
            size = sizes[index].original if frame == "original_px" else sizes[index].resized
        if size is None or min(size) <= 0:
            needed = f"the image's size, or verifier_parm.{name} = [width, height], both positive"
            raise SpecError(f"frame {frame!r} needs {needed}; the row has {size}")
        return size


def frame_in_force(context: Context) -> Frame:
    """`rewards.frame`; `auto`, which a run replaces by its model's, is `original_px` where there is no model."""
    frame = context.options.frame
    return "original_px" if frame == "auto" else frame


def contradiction(frame: Frame, boxes: Sequence[Box]) -> str:
    """Why an answer's boxes are in another frame than `frame` for certain; empty where they need not be."""
    is_fraction = False
    for box in boxes:
        _, _, x2, y2 = box.bbox_2d
        if frame == "norm_1":
            if x2 > 2.0 or y2 > 2.0:
                return f"coordinates up to {max(x2, y2):g} where the frame is norm_1, fractions of the image"
        elif x2 > 1.0 or y2 > 1.0:
            return ""
        else:
            is_fraction = is_fraction or not (x2.is_integer() and y2.is_integer())
    return f"coordinates are fractions where the frame is {frame}" if is_fraction else ""

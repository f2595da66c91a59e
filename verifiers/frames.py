"""Coordinate frames of boxes, and the way from one to another.

`original_px`: pixels of the image as it lies in the data. `resized_px`: pixels of the image the model saw. `norm_1000`,
`norm_1`: fractions of width and height, times 1000 or 1. Scaling an axis leaves IoU as it is, so a conversion changes
no score by itself; leaving it out where frames differ makes every score wrong.
"""

from __future__ import annotations

from verifiers.types import Frame

Size = tuple[float, float]


class FrameError(ValueError):
    """A frame needs an image size that the row does not give."""


def frame_extent(frame: Frame, original_size: Size | None, resized_size: Size | None) -> Size:
    """Width and height of the whole image in `frame`; FrameError where the size it needs is missing or not positive."""
    if frame == "norm_1":
        return 1.0, 1.0
    if frame == "norm_1000":
        return 1000.0, 1000.0
    name, size = ("original_size", original_size) if frame == "original_px" else ("resized_size", resized_size)
    if size is None or min(size) <= 0:
        raise FrameError(
            f"frame {frame!r} needs verifier_parm.{name} = [width, height], both positive; the row has {size}"
        )
    return size


def scale_between(source: Frame, target: Frame, original_size: Size | None, resized_size: Size | None) -> Size | None:
    """Factors (x, y) that take coordinates from `source` to `target`; None where the frames are the same and no size is
    needed.
    """
    if source == target:
        return None
    from_width, from_height = frame_extent(source, original_size, resized_size)
    to_width, to_height = frame_extent(target, original_size, resized_size)
    return to_width / from_width, to_height / from_height

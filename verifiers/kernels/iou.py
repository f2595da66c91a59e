"""Intersection over union of boxes: the public pairwise function, and the kernels that others build on.

Boxes are (x1, y1, x2, y2). The arithmetic is pycocotools': a pair without overlap, of zero area, with a NaN or with an
area that overflows has IoU 0.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verifiers.kernels.compiled import compiled

Matrix = NDArray[np.float64]


@compiled
def box_iou(a_xyxy: Matrix, b_xyxy: Matrix) -> float:
    """IoU of two boxes, each of shape [4]."""
    width = min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0])
    height = min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1])
    if not (width > 0.0 and height > 0.0):
        return 0.0
    shared = width * height
    area_a = (a_xyxy[2] - a_xyxy[0]) * (a_xyxy[3] - a_xyxy[1])
    area_b = (b_xyxy[2] - b_xyxy[0]) * (b_xyxy[3] - b_xyxy[1])
    union = area_a + area_b - shared
    if not (union > 0.0 and np.isfinite(union)):
        return 0.0
    return float(shared / union)


@compiled
def iou_matrix(a_xyxy: Matrix, b_xyxy: Matrix) -> Matrix:
    """IoU of every pair: [A, 4], [B, 4] → [A, B]."""
    out = np.empty((a_xyxy.shape[0], b_xyxy.shape[0]))
    for i in range(a_xyxy.shape[0]):
        for j in range(b_xyxy.shape[0]):
            out[i, j] = box_iou(a_xyxy[i], b_xyxy[j])
    return out


@compiled
def framed_iou_matrix(a_xyxy: Matrix, b_xyxy: Matrix, scale: Matrix) -> Matrix:
    """IoU of every pair, [A, 4], [B, 4] → [A, B], in b's frame. `scale` [3]: factors (x, y) from a's frame to b's, and how far, in a's,
    a whole coordinate of a may be from b's to count as b's."""
    out = np.empty((a_xyxy.shape[0], b_xyxy.shape[0]))
    box = np.empty(4)
    for i in range(a_xyxy.shape[0]):
        for j in range(b_xyxy.shape[0]):
            for k in range(4):
                value, factor = a_xyxy[i, k], scale[k % 2]
                box[k] = value * factor
                if value == np.floor(value) and abs(value - b_xyxy[j, k] / factor) <= scale[2]:
                    box[k] = b_xyxy[j, k]
            out[i, j] = box_iou(box, b_xyxy[j])
    return out


def as_boxes(boxes_xyxy: ArrayLike) -> Matrix:
    """Boxes as the contiguous float64 [N, 4] that kernels take; ValueError for any other shape."""
    array = np.ascontiguousarray(boxes_xyxy, dtype=np.float64)
    if array.size == 0:
        return np.empty((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"boxes must have shape [N, 4] (x1, y1, x2, y2), not {list(array.shape)}")
    return array


def pairwise_iou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> Matrix:
    """IoU of every pair: [A, 4], [B, 4] → [A, B] float64. ValueError where a shape is not [N, 4]."""
    return iou_matrix(as_boxes(a_xyxy), as_boxes(b_xyxy))

"""Intersection over union of boxes: the public pairwise functions, and the scalar kernels other kernels build on.

Boxes are (x1, y1, x2, y2). The arithmetic is pycocotools': a pair without overlap, of zero area, with a NaN or with an
area that overflows has IoU 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from verifiers.compiled import compiled

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
def box_giou(a_xyxy: Matrix, b_xyxy: Matrix) -> float:
    """Generalised IoU in [-1, 1] of two boxes of shape [4] (Rezatofighi et al. 2019, Eq. 1); -1 where the hull has no
    finite area.
    """
    width = max(0.0, min(a_xyxy[2], b_xyxy[2]) - max(a_xyxy[0], b_xyxy[0]))
    height = max(0.0, min(a_xyxy[3], b_xyxy[3]) - max(a_xyxy[1], b_xyxy[1]))
    shared = width * height
    area_a = (a_xyxy[2] - a_xyxy[0]) * (a_xyxy[3] - a_xyxy[1])
    area_b = (b_xyxy[2] - b_xyxy[0]) * (b_xyxy[3] - b_xyxy[1])
    union = area_a + area_b - shared
    hull_width = max(a_xyxy[2], b_xyxy[2]) - min(a_xyxy[0], b_xyxy[0])
    hull = hull_width * (max(a_xyxy[3], b_xyxy[3]) - min(a_xyxy[1], b_xyxy[1]))
    if not (hull > 0.0 and np.isfinite(hull)):
        return -1.0
    overlap = shared / union if union > 0.0 else 0.0
    return float(overlap - (hull - union) / hull)


@compiled
def iou_matrix(a_xyxy: Matrix, b_xyxy: Matrix) -> Matrix:
    """IoU of every pair: [A, 4], [B, 4] → [A, B]."""
    out = np.empty((a_xyxy.shape[0], b_xyxy.shape[0]))
    for i in range(a_xyxy.shape[0]):
        for j in range(b_xyxy.shape[0]):
            out[i, j] = box_iou(a_xyxy[i], b_xyxy[j])
    return out


@compiled
def giou_matrix(a_xyxy: Matrix, b_xyxy: Matrix) -> Matrix:
    """Generalised IoU of every pair: [A, 4], [B, 4] → [A, B]."""
    out = np.empty((a_xyxy.shape[0], b_xyxy.shape[0]))
    for i in range(a_xyxy.shape[0]):
        for j in range(b_xyxy.shape[0]):
            out[i, j] = box_giou(a_xyxy[i], b_xyxy[j])
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


def pairwise_giou(a_xyxy: ArrayLike, b_xyxy: ArrayLike) -> Matrix:
    """Generalised IoU of every pair: [A, 4], [B, 4] → [A, B] float64. ValueError where a shape is not [N, 4]."""
    return giou_matrix(as_boxes(a_xyxy), as_boxes(b_xyxy))

"""Overlap of boxes, against pycocotools."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask

from verifiers.kernels.iou import pairwise_iou

# Quarter pixels: x + width is exact, so both layouts mean the same box.
corner = st.integers(-40_000, 40_000).map(lambda quarter: quarter / 4)
extent = st.integers(0, 4_000).map(lambda quarter: quarter / 4)
boxes = st.lists(st.tuples(corner, corner, extent, extent), min_size=1, max_size=6)


def xyxy(boxes_xywh: list[tuple[float, ...]]) -> np.ndarray:
    array = np.array(boxes_xywh)
    return np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], axis=1)


@given(boxes, boxes)
def test_iou_equals_pycocotools(a_xywh, b_xywh) -> None:
    expected = mask.iou(np.array(a_xywh), np.array(b_xywh), [0] * len(b_xywh))
    assert pairwise_iou(xyxy(a_xywh), xyxy(b_xywh)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "hostile", [[0, 0, np.nan, 1], [0, 0, np.inf, np.inf], [-1e308, -1e308, 1e308, 1e308], [5, 5, 5, 5], [9, 9, 1, 1]]
)
def test_a_hostile_box_overlaps_nothing(hostile: list[float]) -> None:
    assert pairwise_iou([hostile], [[0, 0, 10, 10]]).tolist() == [[0.0]]
    assert pairwise_iou([hostile], [hostile]).tolist() == [[0.0]]


def test_anything_but_four_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, 4\]"):
        pairwise_iou([[1, 2, 3]], [[0, 0, 1, 1]])
    assert pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)

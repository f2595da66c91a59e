"""What `from verifiers import …` gives, and what it costs."""

import subprocess
import sys

import pytest

import verifiers

PROBE = """
import sys, verifiers
assert "numba" not in sys.modules
assert verifiers.pairwise_iou([[0, 0, 2, 1]], [[0, 0, 1, 1]]).tolist() == [[0.5]]
from verifiers import coco_average_precision
assert coco_average_precision([[0, 0, 2, 1]], ["cat"], [[0, 0, 2, 1]], ["cat"]) == (1.0, 1.0, 1.0)
assert "numba" in sys.modules
"""


def test_the_kernels_functions_come_by_name_and_bring_numba_at_their_first_use_only() -> None:
    subprocess.run([sys.executable, "-c", PROBE], check=True)


def test_every_public_name_is_there_and_no_other() -> None:
    assert {"score", "pairwise_iou", "coco_average_precision"} <= set(verifiers.__all__)
    assert all(getattr(verifiers, name) is not None for name in verifiers.__all__)
    with pytest.raises(AttributeError, match="no attribute 'scroe'"):
        verifiers.scroe  # noqa: B018

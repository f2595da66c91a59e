"""The one way kernels are compiled here: numba, without the GIL, cached on disk.

A kernel takes flat arrays of many samples at once and holds no Python object. Importing this module imports numba (about half a
second), so only kernels do, and kernels are imported at the first score that needs them.

numba's own cache looks at a kernel's file only, not at the kernels it calls in other files: a change there would go unnoticed.
The cache therefore lies in a folder named after the text of all kernel files, under the user's cache folder.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])
KERNEL_FILES = ("average_precision.py", "compiled.py", "detection_scores.py", "iou.py", "matching.py")


@cache
def cache_folder() -> Path:
    """Where this version of the kernels is cached: below NUMBA_CACHE_DIR if that is set, else below the user's cache folder.

    Below the temporary folder where that cannot be written.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for name in KERNEL_FILES:
        digest.update((Path(__file__).parent / name).read_bytes())
    base = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = f"kernels-{digest.hexdigest()[:16]}"
    folder = Path(base) / "vtriune" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir()) / f"vtriune-{os.getuid()}" / name
    return folder


def compiled(function: F) -> F:
    """Compile a kernel at its first call, or load it from the cache; what only other kernels call is loaded with them.

    Callers pass C-contiguous float64, int64 and bool arrays, so that each kernel is compiled for one signature. Division by zero
    follows IEEE 754.
    """
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        return cast("F", numba.njit(nogil=True, cache=True, error_model="numpy")(function))
    finally:
        numba.config.CACHE_DIR = before

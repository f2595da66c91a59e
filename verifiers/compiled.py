"""The one way kernels are compiled here: numba, without the GIL, cached on disk, signature stated.

A kernel takes flat arrays of many samples at once and holds no Python object. Importing this module imports numba
(about half a second), so only kernels do, and kernels are imported at the first score that needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(signature: str | None = None, *, inline: bool = False) -> Callable[[F], F]:
    """Compile a kernel for one signature (numba's notation) when its module is imported, or load it from the cache.

    Without a signature the function compiles into the kernels that call it. Division by zero follows IEEE 754.
    """
    choices: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
    if inline:
        choices["inline"] = "always"
    decorate = numba.njit(**choices) if signature is None else numba.njit(signature, **choices)
    return cast("Callable[[F], F]", decorate)

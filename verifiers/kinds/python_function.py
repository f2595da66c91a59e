"""A user's own reward function, named by import path in the row and allowed by name in the configuration. Runs in a worker.

def reward(response: str, gold: str, **arguments) -> float | tuple[float, dict[str, float]]
"""

import importlib
from collections.abc import Callable
from typing import Any

import msgspec

from verifiers.registry import Context, Outcome, SpecError, nearest, verifier


class PythonParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`function`: `module:name`, one of `rewards.python`; `arguments` are passed to it by keyword."""

    function: str
    arguments: dict[str, Any] = {}


def resolve(function: str, allowed: tuple[str, ...]) -> Callable[..., Any]:
    """The function of that path. SpecError where it is not allowed, or, looked at only then, cannot be imported."""
    if function not in allowed:
        hint = nearest(function, allowed)
        raise SpecError(f"function {function!r} is not in rewards.python{hint}; it lists {list(allowed)}")
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"function {function!r} cannot be imported: {error}") from error
    if not callable(found):
        raise SpecError(f"{function!r} is no function")
    return found  # type: ignore[no-any-return]


@verifier("python")
class PythonFunction:
    """Accuracy: what the function returns, a number in [0, 1], alone or with components."""

    def score(self, response: str, gold: str, params: PythonParams, context: Context) -> Outcome:
        result = resolve(params.function, context.options.python)(response, gold, **params.arguments)
        accuracy, components = result if isinstance(result, tuple) else (result, {})
        return Outcome(float(accuracy), {name: float(value) for name, value in components.items()})

    def check(self, gold: str, params: PythonParams, context: Context) -> str | None:
        """The function must be allowed and importable."""
        resolve(params.function, context.options.python)
        return None

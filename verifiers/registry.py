"""The table of verifiers: how one is registered, found by name, and given its typed parameters.

    @verifier("exact")
    def exact(response: str, gold: str, params: ExactParams, context: Context) -> Outcome: ...

The third argument's annotation is the parameter struct. A class registers the same way, with a method `score` of that
signature, and may add:
    is_bounded      true where its time is bounded by the response's length: the pool may score it without a worker
    score_batch     many tasks at once
    score_at_once   the outcome of a task where it is known in microseconds, else None
    cache_key       what a task's outcome depends on
    gold_response   the gold answer as a model should give it
    check           what is wrong with a row, apart from its gold answer
Other packages register through the entry-point group `vtriune.verifiers`: each entry names a module to import. An
unknown name or parameter is a SpecError with the nearest one.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Literal, Protocol, TypeVar, cast, get_type_hints

import msgspec

from verifiers.types import RewardOptions, RewardSpec

# Keys of the row schema: any row may carry them, whatever its verifier.
SCHEMA_KEYS = ("verifier_style", "det_verifier_normalized", "det_reward_ratio")
BUILT_IN = {
    "mathverify": "verifiers.mathverify",
    "detection": "verifiers.detection",
    "ocr": "verifiers.ocr",
    "multiple_choice": "verifiers.multiple_choice",
    "counting": "verifiers.counting",
    "point": "verifiers.point",
    "polygon": "verifiers.polygon",
    "temporal": "verifiers.temporal",
    "json_fields": "verifiers.json_fields",
    "python": "verifiers.python_function",
}
ENTRY_POINTS = "vtriune.verifiers"


class SpecError(ValueError):
    """A row's reward set-up is wrong: unknown verifier or parameter, a value outside its range. The message says what
    to change.
    """


class GoldError(ValueError):
    """The gold answer cannot be used by this verifier: the sample is bad data, its verdict a fault."""


class JudgeError(Exception):
    """What a verifier raised in a worker process, or how its workers ended; the message is the verdict's reason."""


class Context(msgspec.Struct, frozen=True):
    """What a verifier may know beyond its row: the options, and the training progress in [0, 1]."""

    options: RewardOptions
    progress: float


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """What a verifier returns. `format` None leaves the format reward to the tag rule."""

    accuracy: float
    components: dict[str, float] = {}
    format: float | None = None
    status: Literal["ok", "bad_answer"] = "ok"
    reason: str = ""


class Task(msgspec.Struct, frozen=True, gc=False):
    """One response to score, as `score_batch` receives it."""

    response: str
    gold: str
    params: Any
    context: Context


class NoParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of a verifier that has none."""


class Implementation(Protocol):
    """What the registry holds for a name, whether it came from a function or a class."""

    params_type: type[msgspec.Struct]
    is_bounded: bool

    def score_batch(self, tasks: Sequence[Task]) -> list[Outcome | Exception]: ...
    def score_at_once(self, task: Task) -> Outcome | Exception | None: ...
    def cache_key(self, task: Task) -> tuple[Hashable, ...] | None: ...
    def gold_response(self, gold: str, params: Any, context: Context) -> str: ...
    def check(self, gold: str, params: Any, context: Context) -> str | None: ...


class _Registered:
    """Fills in what a registered function or class leaves out."""

    def __init__(self, name: str, target: Any) -> None:
        made = target() if inspect.isclass(target) else target
        self.score = cast("Callable[..., Outcome]", getattr(made, "score", made))
        signature = list(inspect.signature(self.score).parameters)
        if len(signature) != 4:
            raise TypeError(f"verifier {name!r} must take (response, gold, params, context), not {signature}")
        params_type = get_type_hints(self.score).get(signature[2])
        if not (inspect.isclass(params_type) and issubclass(params_type, msgspec.Struct)):
            raise TypeError(f"verifier {name!r}: annotate {signature[2]!r} with a msgspec.Struct of its parameters")
        self.params_type: type[msgspec.Struct] = params_type
        self.is_bounded: bool = getattr(made, "is_bounded", False)
        self._at_once: Callable[[Task], Outcome | None] | None = getattr(made, "score_at_once", None)
        self._cache_key: Callable[[Task], tuple[Hashable, ...] | None] | None = getattr(made, "cache_key", None)
        self._batch: Callable[[Sequence[Task]], list[Outcome | Exception]] | None = getattr(made, "score_batch", None)
        self._gold_response: Callable[[str, Any, Context], str] | None = getattr(made, "gold_response", None)
        self._check: Callable[[str, Any, Context], str | None] | None = getattr(made, "check", None)

    def score_batch(self, tasks: Sequence[Task]) -> list[Outcome | Exception]:
        if self._batch is not None:
            return self._batch(tasks)
        out: list[Outcome | Exception] = []
        for task in tasks:
            try:
                out.append(self.score(task.response, task.gold, task.params, task.context))
            # A verifier may raise anything; the caller turns it into this sample's fault and the others keep their
            # scores.
            except Exception as error:
                out.append(error)
        return out

    def score_at_once(self, task: Task) -> Outcome | Exception | None:
        """The outcome where it is certain to cost microseconds, else None."""
        if self._at_once is None:
            return None
        try:
            return self._at_once(task)
        # As in score_batch: whatever a verifier raises is its own sample's fault.
        except Exception as error:
            return error

    def cache_key(self, task: Task) -> tuple[Hashable, ...] | None:
        """What the outcome depends on, or None where it must not be remembered."""
        return None if self._cache_key is None else self._cache_key(task)

    def gold_response(self, gold: str, params: Any, context: Context) -> str:
        answer = gold if self._gold_response is None else self._gold_response(gold, params, context)
        return f"<think>\n</think>\n<answer>\n{answer}\n</answer>"

    def check(self, gold: str, params: Any, context: Context) -> str | None:
        return None if self._check is None else self._check(gold, params, context)


_registered: dict[str, Implementation] = {}
V = TypeVar("V")


def verifier(name: str) -> Callable[[V], V]:
    """Register a function or class under `name`; a name taken by another module is a ValueError."""

    def register(target: V) -> V:
        _registered[name] = _Registered(name, target)
        return target

    if name in _registered:
        raise ValueError(f"a verifier named {name!r} is registered already")
    return register


@cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def known_names() -> list[str]:
    """Every name a row may use, in order."""
    return sorted({*BUILT_IN, *_registered, *_entry_points()})


def find(name: str) -> Implementation:
    """The verifier of that name, its module imported on first use. SpecError with the nearest name where there is none."""
    if name not in _registered:
        if name in BUILT_IN:
            importlib.import_module(BUILT_IN[name])
        elif name in _entry_points():
            _entry_points()[name].load()
    if name not in _registered:
        raise SpecError(f"unknown verifier {name!r}{nearest(name, known_names())}; known: {', '.join(known_names())}")
    return _registered[name]


def nearest(word: str, known: Sequence[str]) -> str:
    """`, did you mean '…'?` where something known is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def params_of(spec: RewardSpec, implementation: Implementation) -> Any:
    """The row's parameters as the verifier's struct; nulls count as absent. SpecError for an unknown key or a value
    that does not fit.
    """
    given = spec.verifier_parm or {}
    fields = implementation.params_type.__struct_fields__
    kept = {}
    for key, value in given.items():
        if key in fields:
            if value is not None:
                kept[key] = value
        elif value is not None and key not in SCHEMA_KEYS:
            hint = nearest(key, fields)
            raise SpecError(f"verifier {spec.verifier!r} has no parameter {key!r}{hint}; it has {list(fields)}")
    try:
        return msgspec.convert(kept, implementation.params_type, strict=False)
    except msgspec.ValidationError as error:
        raise SpecError(f"verifier_parm of {spec.verifier!r}: {error}") from error

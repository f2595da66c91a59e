"""The table of verifiers: how one is registered, found by name, and given its typed parameters.

    @verifier("exact")
    def exact(response: str, gold: str, params: ExactParams, context: Context) -> Outcome: ...

The third argument's annotation is the parameter struct. AnswerError says that the response holds no answer, GoldError and SpecError
blame the row; anything else raised is a fault. A class registers the same way, with a method `score` of that signature, and may add:
    is_bounded      true where its time is bounded by the response's length: the pool may score it without a worker
    score_batch     many tasks at once
    score_at_once   the outcome of a task where it is known in microseconds, else None
    cache_key       what a task's outcome depends on
    gold_response   the gold answer as a model should give it
    check           what is wrong with a row, apart from its gold answer
Other packages register through the entry-point group `vtriune.verifiers`: each entry names a module to import.
"""

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, get_type_hints

import msgspec

from verifiers.types import ImageSizes, RewardOptions, RewardSpec

# Keys of the row schema: any row may carry them, whatever its verifier.
SCHEMA_KEYS = ("verifier_style", "det_verifier_normalized", "det_reward_ratio")
BUILT_IN = {
    "mathverify": "verifiers.kinds.mathverify",
    "detection": "verifiers.kinds.detection",
    "ocr": "verifiers.kinds.ocr",
    "multiple_choice": "verifiers.kinds.multiple_choice",
    "counting": "verifiers.kinds.counting",
    "point": "verifiers.kinds.point",
    "polygon": "verifiers.kinds.polygon",
    "temporal": "verifiers.kinds.temporal",
    "json_fields": "verifiers.kinds.json_fields",
    "python": "verifiers.kinds.python_function",
}
ENTRY_POINTS = "vtriune.verifiers"
T = TypeVar("T")


class SpecError(ValueError):
    """A row's reward set-up is wrong: unknown verifier or parameter, a value out of range. The message says what to change."""


class AnswerError(ValueError):
    """The response holds no answer of the kind asked for, or several: a bad answer, with the message as its reason."""


class GoldError(ValueError):
    """The gold answer cannot be used by this verifier: the sample is bad data, its verdict a fault."""


class JudgeError(Exception):
    """What a verifier raised in a worker process, or how its workers ended; the message is the verdict's reason."""


class Context(msgspec.Struct, frozen=True):
    """What a verifier may know beyond its row."""

    options: RewardOptions
    progress: float | None
    """Training progress in [0, 1]; None means evaluation."""
    image_sizes: ImageSizes = ()
    """Of the prompt's images; empty where the caller does not know them."""


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


class Implementation:
    """What the registry holds for a name: a function or an instance of a class, and what either leaves out filled in."""

    def __init__(self, name: str, target: Any) -> None:
        made: Any = target() if inspect.isclass(target) else target
        self._score: Callable[..., Outcome] = getattr(made, "score", made)
        signature = list(inspect.signature(self._score).parameters)
        if len(signature) != 4:
            raise TypeError(f"verifier {name!r} must take (response, gold, params, context), not {signature}")
        params_type = get_type_hints(self._score).get(signature[2])
        if not (inspect.isclass(params_type) and issubclass(params_type, msgspec.Struct)):
            raise TypeError(f"verifier {name!r}: annotate {signature[2]!r} with a msgspec.Struct of its parameters")
        self.params_type: type[msgspec.Struct] = params_type
        self.is_bounded: bool = getattr(made, "is_bounded", False)
        self.score_batch: Callable[[Sequence[Task]], list[Outcome | Exception]]
        self.score_batch = getattr(made, "score_batch", self._score_one_by_one)
        self.cache_key: Callable[[Task], tuple[Hashable, ...] | None]
        self.cache_key = getattr(made, "cache_key", lambda task: None)
        self.check: Callable[[str, Any, Context], str | None]
        self.check = getattr(made, "check", lambda gold, params, context: None)
        self._at_once: Callable[[Task], Outcome | None] = getattr(made, "score_at_once", lambda task: None)
        self._gold_answer: Callable[[str, Any, Context], str]
        self._gold_answer = getattr(made, "gold_response", lambda gold, params, context: gold)

    def _score_one_by_one(self, tasks: Sequence[Task]) -> list[Outcome | Exception]:
        return [_result(self._score, task.response, task.gold, task.params, task.context) for task in tasks]

    def score_at_once(self, task: Task) -> Outcome | Exception | None:
        """The outcome where it is certain to cost microseconds, else None."""
        return _result(self._at_once, task)

    def gold_response(self, gold: str, params: Any, context: Context) -> str:
        """The gold answer as a model should give it, tags and all."""
        return f"<think>\n</think>\n<answer>\n{self._gold_answer(gold, params, context)}\n</answer>"


def _result(work: Callable[..., T], *arguments: object) -> T | Outcome | Exception:
    try:
        return work(*arguments)
    except AnswerError as error:
        return Outcome(0.0, status="bad_answer", reason=str(error))
    # A verifier may raise anything; the caller turns it into this sample's fault and the others keep their scores.
    except Exception as error:
        return error


_registered: dict[str, Implementation] = {}


def verifier(name: str) -> Callable[[T], T]:
    """Register a function or class under `name`; a name taken by another module is a ValueError."""

    def register(target: T) -> T:
        _registered[name] = Implementation(name, target)
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
    """The row's parameters as the verifier's struct; nulls count as absent. SpecError for an unknown key or an unfit value."""
    fields = implementation.params_type.__struct_fields__
    given = {key: value for key, value in (spec.verifier_parm or {}).items() if value is not None}
    for key in given:
        if key not in fields and key not in SCHEMA_KEYS:
            hint = nearest(key, fields)
            raise SpecError(f"verifier {spec.verifier!r} has no parameter {key!r}{hint}; it has {list(fields)}")
    kept = {key: value for key, value in given.items() if key in fields}
    try:
        return msgspec.convert(kept, implementation.params_type, strict=False)
    except msgspec.ValidationError as error:
        raise SpecError(f"verifier_parm of {spec.verifier!r}: {error}") from error

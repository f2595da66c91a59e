"""Errors as they travel, and the kind that each declares: what it has broken. Re-exported by `vtriune.runtime`."""

from __future__ import annotations

import asyncio
import traceback
from typing import Literal, TypeAlias, get_args

from vtriune.transport.errors import DeadlineExceeded, MessageRefused
from vtriune.transport.wire import ErrorNote, PeerRef, refusal

_RAISED, _DEADLINE, _CANCELLED = "raised", "deadline", "cancelled"
_TEXT_CHARACTERS = 8192
_TRACEBACK_CHARACTERS = 1 << 16

Kind: TypeAlias = Literal["bystander", "lease", "engine", "fatal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEFAULT_KIND: Kind = "lease"


class ActorError(Exception):
    """An endpoint (or an actor's constructor) raised. Its traceback is part of this error's text.

    `type_name` is the exception's full name, such as `builtins.ValueError`; `text` its message; `kind` what it says to have
    broken, by which a caller decides what to do: names of classes are for people.
    """

    def __init__(self, where: str, type_name: str, text: str, remote_traceback: str, kind: Kind = DEFAULT_KIND) -> None:
        super().__init__(where, type_name, text, remote_traceback, kind)
        self.where = where
        self.type_name = type_name
        self.text = text
        self.remote_traceback = remote_traceback
        self.kind = kind

    @property
    def reason(self) -> str:
        """What was raised, in one line: `ValueError: bad prompt`."""
        return f"{self.type_name.rpartition('.')[2]}: {self.text}".partition("\n")[0]

    def __str__(self) -> str:
        name = self.type_name.removeprefix("builtins.")
        return f"{self.where} raised {name}: {self.text}\n\nRemote traceback:\n{self.remote_traceback}"


def kind_of(error: BaseException) -> Kind:
    """What an error says to have broken.

    An exception class declares it by an attribute `kind`, which subclasses inherit; it may stand in a package that knows
    nothing of this one. The nearest declaration counts: the error's own, else that of what it was raised `from`, and so on;
    a group without one of its own is as grave as its gravest member. Without any, or with a word that is none of these, it
    is `lease`.

        bystander   whoever raised it is unharmed: the cause lies with another
        lease       this call's work; the same may succeed elsewhere, or once more
        engine      whoever raised it: it can do no further work and is to be replaced
        fatal       the run
    """
    source = _declaring(error)
    return (source and _declared(source)) or DEFAULT_KIND


def _declared(error: BaseException) -> Kind | None:
    return _known(vars(error).get("kind", getattr(type(error), "kind", None)))


def _known(word: object) -> Kind | None:
    return next((kind for kind in KINDS if isinstance(word, str) and word == kind), None)


def _declaring(error: BaseException) -> BaseException | None:
    """The error whose declaration counts for `error`."""
    cause: BaseException | None = error
    seen: set[int] = set()
    # An error may be its own cause: `raise error from error`.
    while cause is not None and id(cause) not in seen:
        if _declared(cause):
            return cause
        if isinstance(cause, BaseExceptionGroup):
            return _declaring(max(cause.exceptions, key=lambda member: KINDS.index(kind_of(member))))
        seen.add(id(cause))
        cause = cause.__cause__
    return None


def note_from_error(error: BaseException) -> ErrorNote:
    """An exception as it travels. Never raises."""
    if isinstance(error, asyncio.CancelledError):
        return ErrorNote(_CANCELLED, "asyncio.CancelledError", "cancelled", "")
    if isinstance(error, DeadlineExceeded):
        return ErrorNote(_DEADLINE, "vtriune.transport.errors.DeadlineExceeded", _text(error), "")
    if isinstance(error, MessageRefused):
        return refusal(_text(error))
    name = f"{type(error).__module__}.{type(error).__qualname__}"[:256]
    lines = _encodable("".join(traceback.format_exception(error)))
    if len(lines) > _TRACEBACK_CHARACTERS:
        lines = f"{lines[: _TRACEBACK_CHARACTERS // 2]}\n[...]\n{lines[-_TRACEBACK_CHARACTERS // 2 :]}"
    return ErrorNote(_RAISED, name, _text(error), lines, _travelling_kind(error))


def _travelling_kind(error: BaseException) -> Kind:
    """What a caller is told: another actor's error that passes through this one says nothing of this one, unless it ends
    the run."""
    kind = kind_of(error)
    return kind if kind == "fatal" or not isinstance(_declaring(error), ActorError) else DEFAULT_KIND


def _text(error: BaseException) -> str:
    try:
        return _encodable(str(error))[:_TEXT_CHARACTERS]
    except Exception as failure:
        # A call must end in its error, whatever its author's `__str__` does.
        return f"(its text could not be made: {type(failure).__name__})"


def _encodable(text: str) -> str:
    """File names that are no UTF-8 bring lone surrogates, which cannot travel."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_from_note(note: ErrorNote, endpoint: str, peer: PeerRef) -> Exception:
    """The exception a caller sees for one that happened at `peer`."""
    where = f"{endpoint} at {peer}"
    if note.outcome == "refused":
        return MessageRefused(f"{where} refused the message: {note.text}")
    if note.outcome == _DEADLINE:
        return DeadlineExceeded(f"{where}: {note.text}")
    if note.outcome == _CANCELLED:
        return ActorError(where, note.type_name, "the endpoint's task was cancelled over there", note.traceback)
    return ActorError(where, note.type_name, note.text, note.traceback, _known(note.kind) or DEFAULT_KIND)

"""What code running inside an actor may ask about itself: its rank, its mesh, when its call must end."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import Protocol

from vtriune.runtime.shape import Point
from vtriune.transport.errors import MeshFailure


class RunningActor(Protocol):
    """The actor that code runs in."""

    name: str
    point: Point

    def supervise(self, failure: MeshFailure) -> None:
        """Have it told that a process it spawned has failed. Called on any thread."""
        ...


_actor: ContextVar[RunningActor | None] = ContextVar("vtriune_actor", default=None)
# When the running call's deadline passes, on the monotonic clock.
call_end: ContextVar[float | None] = ContextVar("vtriune_call_end", default=None)


def enter(actor: RunningActor, deadline_s: float | None) -> None:
    """Mark the current context as running in `actor`, in a call with this much time."""
    _actor.set(actor)
    call_end.set(None if deadline_s is None else time.monotonic() + deadline_s)


def current_actor() -> RunningActor | None:
    """The actor this code runs in; None in the root process."""
    return _actor.get()


def _running() -> RunningActor:
    actor = _actor.get()
    if actor is None:
        raise RuntimeError("the current rank, size and name have a meaning inside an actor only")
    return actor


def current_rank() -> Point:
    """Where the running actor stands in the mesh it was spawned on. Raises RuntimeError outside an actor."""
    return _running().point


def current_size() -> dict[str, int]:
    """Sizes of the mesh the running actor was spawned on. Raises RuntimeError outside an actor."""
    return dict(current_rank().extent)


def current_actor_name() -> str:
    """Name the running actor's mesh was spawned under. Raises RuntimeError outside an actor."""
    return _running().name

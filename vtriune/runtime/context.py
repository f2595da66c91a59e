"""What code running inside an actor may ask about itself: its rank, its mesh, the time its call has left."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from vtriune.runtime.shape import Point

if TYPE_CHECKING:
    from vtriune.runtime.hosting import ActorHost

_host: ContextVar[ActorHost | None] = ContextVar("vtriune_actor", default=None)
# When the running call's deadline passes, on the monotonic clock.
call_end: ContextVar[float | None] = ContextVar("vtriune_call_end", default=None)


def enter(host: ActorHost, deadline_s: float | None) -> None:
    """Mark the current context as running in `host`, in a call with this much time."""
    _host.set(host)
    call_end.set(None if deadline_s is None else time.monotonic() + deadline_s)


def current_host() -> ActorHost | None:
    """The actor this code runs in; None in the root process."""
    return _host.get()


def time_left_s() -> float | None:
    """Seconds until the running call's deadline; None without one."""
    end = call_end.get()
    return None if end is None else end - time.monotonic()


def current_rank() -> Point:
    """Where the running actor stands in the mesh it was spawned on.

    Raises:
        RuntimeError: called outside an actor.
    """
    host = _host.get()
    if host is None:
        raise RuntimeError("current_rank() has a meaning inside an actor only")
    return host.point


def current_size() -> dict[str, int]:
    """Sizes of the mesh the running actor was spawned on. Raises RuntimeError outside an actor."""
    return dict(current_rank().extent)


def current_actor_name() -> str:
    """Name the running actor's mesh was spawned under. Raises RuntimeError outside an actor."""
    host = _host.get()
    if host is None:
        raise RuntimeError("current_actor_name() has a meaning inside an actor only")
    return host.name

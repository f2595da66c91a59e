"""Actors in processes: the vocabulary of torchmonarch's `monarch.actor`, on ZeroMQ and msgspec.

    class Echo(Actor):
        def __init__(self, greeting: str) -> None:
            self.greeting = greeting

        @endpoint
        async def greet(self, name: str) -> str:
            return f"{self.greeting} {name}"

    procs = this_host().spawn_procs(per_host={"procs": 4})
    echo = procs.spawn("echo", Echo, "hello")
    echo.greet.call("world").get()                 # every rank, a ValueMesh
    await echo.slice(procs=0).greet.call_one("x")  # one rank
    await echo.greet.choose("x")                   # any one rank, the least busy
    echo.greet.broadcast("x")                      # no reply
    procs.stop().get()

Guarantees: order per sender and receiver; bounded queues in messages and bytes; nothing dropped silently; every call
ends in a value or in an error naming the rank; a failed process is a MeshFailure at its owner, once.
"""

from vtriune.runtime import failure as _failure
from vtriune.runtime.actor import Actor, Endpoint, endpoint
from vtriune.runtime.context import current_actor_name, current_rank, current_size
from vtriune.runtime.failure import (
    ActorError,
    BacklogFull,
    ConnectionLost,
    DeadlineExceeded,
    MeshFailure,
    MessageRefused,
)
from vtriune.runtime.future import Future, Stream
from vtriune.runtime.mesh import ActorMesh
from vtriune.runtime.node import configure, interface_of, shutdown
from vtriune.runtime.proc_group import RestartPolicy
from vtriune.runtime.proc_mesh import HostMesh, ProcMesh, this_host
from vtriune.runtime.shape import Extent, Point, ValueMesh
from vtriune.runtime.watchdog import ProgressWatchdog, Stall
from vtriune.transport.wire import Limits

__all__ = [
    "Actor",
    "ActorError",
    "ActorMesh",
    "BacklogFull",
    "ConnectionLost",
    "DeadlineExceeded",
    "Endpoint",
    "Extent",
    "Future",
    "HostMesh",
    "Limits",
    "MeshFailure",
    "MessageRefused",
    "Point",
    "ProcMesh",
    "ProgressWatchdog",
    "RestartPolicy",
    "Stall",
    "Stream",
    "ValueMesh",
    "configure",
    "current_actor_name",
    "current_rank",
    "current_size",
    "endpoint",
    "interface_of",
    "set_unhandled_fault_hook",
    "shutdown",
    "this_host",
]


def set_unhandled_fault_hook(hook: _failure.FaultHook) -> None:
    """Replace what happens in the root process to a failure that no owner handles; by default the run ends."""
    _failure.unhandled_fault_hook = hook

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

The files, each knowing those above it only:

    shape                       named dimensions, and the values that come back over them
    failure                     errors as they travel, and the kind that each declares
    future                      what a call returns
    context                     what code may ask of the actor it runs in
    signature, actor            annotations as wire schemas; actors and endpoints as users declare them
    class_path, bootstrap       what a child is told, and by which name it finds an actor's class
    steps                       what this process got done last, and those below it
    memory_kills, watcher       the thread that starts and watches children
    stacks                      Python stacks of processes that are stuck
    node                        this process: its inbox, its links to others
    mesh                        actors to be called
    invocation, hosting         the other end: calls run on their actor
    processes/                  local_process or ray_process, proc_group, proc_mesh; worker, the program; watchdog

Guarantees: order per sender and receiver; bounded queues in messages and bytes; nothing dropped silently; every call
ends in a value or in an error naming the rank; a failed process is a MeshFailure at its owner, once.
"""

from vtriune.runtime.actor import Actor, ActorReference, Endpoint, endpoint
from vtriune.runtime.context import current_actor_name, current_rank, current_size
from vtriune.runtime.failure import ActorError, Kind, kind_of
from vtriune.runtime.future import Future, Stream
from vtriune.runtime.mesh import ActorMesh
from vtriune.runtime.node import configure, interface_of, shutdown
from vtriune.runtime.processes.proc_group import RestartPolicy, set_unhandled_fault_hook
from vtriune.runtime.processes.proc_mesh import HostMesh, ProcMesh, this_host
from vtriune.runtime.processes.watchdog import ProgressWatchdog, Stall
from vtriune.runtime.shape import Extent, Point, ValueMesh
from vtriune.runtime.steps import report_step
from vtriune.transport.errors import BacklogFull, ConnectionLost, DeadlineExceeded, MeshFailure, MessageRefused
from vtriune.transport.wire import Limits

__all__ = [
    "Actor",
    "ActorError",
    "ActorMesh",
    "ActorReference",
    "BacklogFull",
    "ConnectionLost",
    "DeadlineExceeded",
    "Endpoint",
    "Extent",
    "Future",
    "HostMesh",
    "Kind",
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
    "kind_of",
    "report_step",
    "set_unhandled_fault_hook",
    "shutdown",
    "this_host",
]

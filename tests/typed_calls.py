"""What the type checker says of calls to actors: read by mypy, never run.

Each line that is wrong carries the error that mypy must give for it; with `warn_unused_ignores` a call that it would let pass is an
error itself. So a mesh, a role and an actor's class are checked by `make types`, as the product is.
"""

from typing import assert_type

from actors.generator import Generator
from learner.actor import LearnerActor
from vtriune import roles
from vtriune.messages import GroupReport, Lease, SampleRef, TrainOrder, TrainReport
from vtriune.runtime import Actor, ProcMesh, ValueMesh, endpoint


class Echo(Actor):
    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    @endpoint
    async def greet(self, name: str, times: int = 1) -> str:
        return f"{self.greeting} {name}" * times


class NoLearner(Actor):
    @endpoint
    async def train(self, order: int) -> TrainReport:
        raise NotImplementedError


async def calls_of_an_actor(procs: ProcMesh) -> None:
    echo = procs.spawn("echo", Echo, "hello")
    assert_type(await echo.greet.call("world"), ValueMesh[str])
    assert_type(await echo.slice(procs=0).greet.call_one("world", times=2), str)
    echo.greet.call(1)  # type: ignore[arg-type]
    echo.greet.call()  # type: ignore[call-arg]
    echo.greet.broadcast("world", 2, 3)  # type: ignore[call-arg]
    echo.shout.call("world")  # type: ignore[attr-defined]


async def calls_of_a_role(learner: roles.Learner, generator: roles.Generator, order: TrainOrder, lease: Lease) -> None:
    assert_type(await learner.train.call(order), ValueMesh[TrainReport])
    assert_type(await generator.generate.call_one(lease, [generator]), GroupReport)
    learner.train.call(SampleRef("", 0))  # type: ignore[arg-type]
    generator.generate.call_one(lease)  # type: ignore[call-arg]
    generator.generate.call_one(lease, [learner])  # type: ignore[list-item]
    learner.teach.call(order)  # type: ignore[attr-defined]


def classes_of_roles() -> None:
    right: tuple[type[roles.Learner], type[roles.Generator]] = (LearnerActor, Generator)
    wrong: type[roles.Learner] = NoLearner  # type: ignore[assignment]
    assert right
    assert wrong

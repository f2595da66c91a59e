"""Actors the runtime's tests spawn."""

from __future__ import annotations

import asyncio
import locale
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from vtriune.runtime import (
    Actor,
    ActorMesh,
    MeshFailure,
    context,
    current_actor_name,
    current_rank,
    current_size,
    endpoint,
    report_step,
    this_host,
)


class Group(msgspec.Struct):
    name: str
    tokens: list[np.ndarray]
    rewards: npt.NDArray[np.float32]
    note: str | None = None


class Echo(Actor):
    def __init__(self, greeting: str = "hello") -> None:
        self.greeting = greeting
        self.log: list[int] = []

    @endpoint
    async def greet(self, name: str) -> str:
        return f"{self.greeting} {name}"

    @endpoint
    async def say(self, text: str) -> str:
        """Print and log it; returns how files are read and written here that nobody names an encoding for."""
        print(text, "\udcff")
        logging.warning(text)
        return locale.getpreferredencoding(False).lower()

    @endpoint
    async def ping(self, x: int) -> int:
        return x

    @endpoint
    async def sink(self, data: bytes) -> int:
        return len(data)

    @endpoint
    async def mirror(self, group: Group) -> Group:
        return group

    @endpoint
    async def where(self) -> tuple[int, dict[str, int], int]:
        point = current_rank()
        return point.rank, dict(point), os.getpid()

    @endpoint
    async def nap(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "rested"

    @endpoint
    def block(self, seconds: float, mark: int = 0) -> str:
        time.sleep(seconds)
        self.log.append(mark)
        return threading.current_thread().name

    @endpoint
    async def hog(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))
        return "let go"

    @endpoint
    def toil(self, num_steps: int, seconds: float, within_s: float = 0.0) -> None:
        """Tells of each step, then takes `seconds` over it."""
        for number in range(num_steps):
            report_step("toil", f"step {number + 1} of {num_steps}", within_s)
            time.sleep(seconds)

    @endpoint
    async def note(self, mark: int) -> None:
        self.log.append(mark)

    @endpoint
    async def marks(self) -> list[int]:
        return self.log

    @endpoint
    async def hold(self, data: bytes, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return len(data)

    @endpoint
    async def stack(self, arrays: list[np.ndarray]) -> int:
        return sum(array.nbytes for array in arrays)

    @endpoint
    async def inflate(self, num_bytes: int) -> bytes:
        return bytes(num_bytes)

    @endpoint
    async def forever(self) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            self.log.append(-1)

    @endpoint
    async def time_left(self) -> float | None:
        end = context.call_end.get()
        return None if end is None else end - time.monotonic()

    @endpoint
    async def fail(self, text: str) -> None:
        raise ValueError(text)

    @endpoint
    async def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @endpoint
    async def leave(self, code: int) -> None:
        print("last words", flush=True)
        os._exit(code)


class Relay(Actor):
    def __init__(self, echo: Echo, untyped: ActorMesh | None = None) -> None:
        self.echo = echo
        self.untyped = untyped

    @endpoint
    async def ask(self, name: str) -> str:
        return await self.echo.greet.choose(name)

    @endpoint
    def ask_blocking(self, name: str) -> list[str]:
        return list(self.echo.greet.call(name).get(timeout=10).values())

    @endpoint
    async def tell(self, echo: Echo, mark: int) -> None:
        await echo.note.broadcast(mark)

    @endpoint
    async def ask_untyped(self, name: str) -> str:
        assert self.untyped is not None
        return await self.untyped.greet.choose(name)


class Fragile(Actor):
    def __init__(self, text: str) -> None:
        raise RuntimeError(text)

    @endpoint
    async def ping(self) -> int:
        return 1


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("this error has no text")


class Garbled(Exception):
    def __str__(self) -> str:
        return "no such file: \udcff"


class Fatal(RuntimeError):
    kind = "fatal"


class RenamedFatal(Fatal):
    """Declares nothing; its base does."""


class BrokenEngine(RuntimeError):
    kind = "engine"


class Elsewhere(RuntimeError):
    kind = "bystander"


class OtherUse(RuntimeError):
    """A library's error that has an attribute of that name for purposes of its own."""

    kind = "socket"


class NoException(BaseException):
    """As libraries have some: torch's of a checkpoint, that of a panic in Rust."""


class Faulty(Actor):
    """Raises what it is told to, itself or through another one."""

    def __init__(self, how: str = "") -> None:
        if how:
            raise made(how)

    @endpoint
    async def fail(self, how: str) -> None:
        raise made(how)

    @endpoint
    def fail_on_its_thread(self, how: str) -> None:
        raise made(how)

    @endpoint
    async def ask(self, other: Faulty, how: str) -> None:
        await other.fail.call_one(how)

    @endpoint
    async def ask_and_wrap(self, other: Faulty, how: str) -> None:
        try:
            await other.fail.call_one(how)
        except Exception as error:
            raise RuntimeError("while asking") from error


def made(how: str) -> BaseException:
    """An error described by class names: `A`, `A from B`, `group of A B`."""
    named = {
        cls.__name__: cls
        for cls in (
            Mute,
            Garbled,
            Fatal,
            RenamedFatal,
            BrokenEngine,
            Elsewhere,
            OtherUse,
            ValueError,
            NoException,
            SystemExit,
        )
    }
    if how.startswith("group of "):
        return ExceptionGroup("several", [named[name]("in a group") for name in how.split()[2:]])  # type: ignore[type-var]
    raised, _, cause = how.partition(" from ")
    error = named[raised]("raised")
    error.__cause__ = error if cause == "itself" else named[cause]("its cause") if cause else None
    return error


class Owner(Actor):
    """Spawns an Echo of its own."""

    def __init__(self, handles: bool) -> None:
        self.handles = handles
        self.seen: list[str] = []
        self.procs = this_host().spawn_procs(per_host={"procs": 1}, name="grandchild")
        self.echo = self.procs.spawn("echo", Echo, "grand")

    def __supervise__(self, failure: MeshFailure) -> bool:
        self.seen.append(str(failure))
        return self.handles

    @endpoint
    async def greet(self, name: str) -> str:
        return await self.echo.greet.call_one(name)

    @endpoint
    async def kill_child(self) -> str:
        try:
            await self.echo.die.call_one()
        except MeshFailure as failure:
            return str(failure)
        return "alive"

    @endpoint
    async def failures(self) -> list[str]:
        return self.seen

    @endpoint
    async def child_pid(self) -> int:
        return self.procs.peers[0].pid


class Meter(Actor):
    """Tells what its process has spent."""

    @endpoint
    async def ping(self, x: int) -> int:
        return x

    @endpoint
    async def cpu_s(self) -> float:
        return time.process_time()


class Glutton(Actor):
    """Takes memory until the kernel objects."""

    @endpoint
    async def eat(self, num_bytes: int) -> int:
        return len(b"x" * num_bytes)

    @endpoint
    async def pid(self) -> int:
        return os.getpid()


class Tidy(Actor):
    """Writes down that it was cleaned up, and with which error; then fails if told to."""

    def __init__(self, path: str, fails: bool = False) -> None:
        self.path = Path(path)
        self.fails = fails

    @endpoint
    async def ping(self) -> int:
        return 1

    async def __cleanup__(self, error: Exception | None) -> None:
        await asyncio.sleep(0)
        self.path.write_text(f"cleaned up, error {error}")
        if self.fails:
            raise OSError("the drain is blocked")


class TidyAtOnce(Actor):
    """The same in a plain method."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def __cleanup__(self, error: Exception | None) -> None:
        self.path.write_text(f"cleaned up, error {error}")


class TidyAfterAWhile(TidyAtOnce):
    """Takes its time to be constructed."""

    def __init__(self, path: str) -> None:
        time.sleep(0.5)
        super().__init__(path)


class Namer(Actor):
    """Says where it stands."""

    @endpoint
    async def place(self) -> tuple[int, dict[str, int], dict[str, int], str]:
        return current_rank().rank, dict(current_rank()), current_size(), current_actor_name()


class Hasty(Actor):
    """Makes its process change threads as often as Python can."""

    def __init__(self) -> None:
        sys.setswitchinterval(1e-6)

"""An event loop without waiting: its clock jumps to the next timer, and threads run at once, in place.

A program under it takes as long as its Python does, always takes the same course, and one that waits for nothing that could come is
found out instead of hanging.
"""

import asyncio
import selectors
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from vtriune.record import checkpoint


class WaitsForEver(AssertionError):
    """Nothing is ready, no timer is set: whoever waits will not be woken."""


class VirtualTime(asyncio.SelectorEventLoop):
    """`now`: virtual seconds since the loop was made."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumps(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: object, func: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*arguments))
        except Exception as error:
            # As an executor does: whatever was raised is the future's.
            future.set_exception(error)
        return future


class _Jumps(selectors.SelectSelector):
    def __init__(self, loop: VirtualTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise WaitsForEver("no timer is set and nothing is ready")
        # Never without moving: what takes place between two looks at the clock has taken some time.
        self._loop.now += max(timeout, 1e-6)
        return []


class _InPlace:
    """An executor whose work is done when it is given."""

    def __init__(self, max_workers: int) -> None: ...

    def __enter__(self) -> "_InPlace":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, func: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [func(*each) for each in zip(*arguments, strict=False)]


@contextmanager
def virtual_time() -> Iterator[VirtualTime]:
    """A loop of its own; `time.monotonic` is its clock meanwhile. Tasks left at the end are cancelled."""
    loop = VirtualTime()
    in_place = patch.object(checkpoint, "ThreadPoolExecutor", _InPlace)
    with patch.object(time, "monotonic", lambda: loop.now), in_place:
        try:
            yield loop
        finally:
            cancel_all(loop)
            loop.close()


def cancel_all(loop: VirtualTime) -> None:
    """End every task at the place where it waits, as a kill does, though `finally` blocks run."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

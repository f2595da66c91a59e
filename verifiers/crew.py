"""The pool's workers as one: takes tasks, gives outcomes, whatever happens to a worker.

    jobs ──▶ lanes [num_workers] ──▶ a ready worker each
                    │ an answer takes longer than PATIENCE_S, and a spare worker is ready:
                    │ the lane leaves that worker to its job and goes on with the spare
                    └ the deadline passes, or the worker dies: kill, start another, ask once more ──▶ retry lane

A lane waits for a job and for a ready worker; a worker becomes ready when it has answered, or has been started anew. So
a slow answer holds a worker, never a lane for longer than PATIENCE_S while a spare is ready, and for the deadline
otherwise. Retries have a lane and therefore a worker of their own: they wait for each other, first attempts never wait
for them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

import msgspec

from verifiers.pool_metrics import PoolMetrics
from verifiers.registry import Outcome
from verifiers.types import RewardSpec
from verifiers.wire import Job, Setup, WireError, encode
from verifiers.worker_process import WorkerDied, WorkerProcess

PATIENCE_S = 0.25
START_DEADLINE_S = 120.0
MAX_ATTEMPTS = 2
MAX_STARTS = 3


class CrewError(RuntimeError):
    """No worker could be started; the message repeats the last one's end."""


class _Ask:
    """A job on its way, and who waits for it."""

    def __init__(self, job: Job, answer: asyncio.Future[Outcome | Exception]) -> None:
        self.job, self.answer, self.num_attempts = job, answer, 0


class JudgeError(Exception):
    """What a verifier raised in a worker, or how the worker ended, twice."""


class Crew:
    """`num_workers` lanes, one for retries, and as many workers as that plus `num_spares`."""

    def __init__(
        self, num_workers: int, num_spares: int, setup: Setup, deadline_s: float, metrics: PoolMetrics
    ) -> None:
        self._num_workers, self._num_spares = num_workers, num_spares
        self._setup, self._deadline_s, self._metrics = setup, deadline_s, metrics
        self._numbers = itertools.count(1)
        self._first: asyncio.Queue[_Ask] = asyncio.Queue()
        self._again: asyncio.Queue[_Ask] = asyncio.Queue()
        self._ready: asyncio.Queue[WorkerProcess] = asyncio.Queue()
        self._workers: set[WorkerProcess] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._asks: set[_Ask] = set()
        self._failure: BaseException | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Return once `num_workers` workers are past their self-test; the others follow one by one. WorkerDied where
        one fails.
        """
        try:
            await asyncio.gather(*(self._add_worker() for _ in range(self._num_workers)))
        except BaseException:
            await self.close()
            raise
        for _ in range(self._num_workers):
            self._watch(self._run_lane(self._first))
        self._watch(self._run_lane(self._again))
        self._watch(self._add_workers(1 + self._num_spares))

    async def score(self, response: str, spec: RewardSpec, progress: float | None) -> Outcome | Exception:
        """The outcome of one response, or the exception to report as its fault."""
        if self._failure is not None:
            raise CrewError(f"the verifier pool has failed: {self._failure}") from self._failure
        try:
            job = Job(next(self._numbers), response, spec, progress)
            encode(job)
        except (WireError, TypeError, UnicodeEncodeError, msgspec.MsgspecError) as error:
            return JudgeError(f"cannot be sent to a worker: {error}")
        ask = _Ask(job, asyncio.get_running_loop().create_future())
        self._asks.add(ask)
        self._first.put_nowait(ask)
        try:
            return await ask.answer
        finally:
            self._asks.discard(ask)

    @property
    def num_waiting(self) -> int:
        return self._first.qsize() + self._again.qsize()

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return sorted(worker.pid for worker in self._workers)

    async def close(self) -> None:
        """End every worker and task; waiting callers get CrewError. Idempotent."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.end() for worker in self._workers))
        self._workers.clear()
        self._fail(CrewError("it was closed"))

    async def _run_lane(self, queue: asyncio.Queue[_Ask]) -> None:
        while True:
            ask = await queue.get()
            if ask.answer.done():
                continue
            worker = await self._ready.get()
            attempt = self._watch(self._attempt(ask, worker))
            await asyncio.wait({attempt}, timeout=PATIENCE_S)

    async def _attempt(self, ask: _Ask, worker: WorkerProcess) -> None:
        """One job on one worker. Afterwards the worker is ready again, or ended and another on its way."""
        ask.num_attempts += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                result = await worker.ask(ask.job)
        except TimeoutError:
            failure = f"no answer within rewards.deadline_s = {self._deadline_s:g} s"
        except WorkerDied as error:
            failure = str(error)
        else:
            self._ready.put_nowait(worker)
            self._metrics.num_by_workers += 1
            self._deliver(ask, result.outcome if result.outcome is not None else JudgeError(result.error))
            return
        await worker.end()
        self._workers.discard(worker)
        self._metrics.num_restarts += 1
        self._watch(self._add_workers(1))
        if ask.num_attempts < MAX_ATTEMPTS:
            self._metrics.num_retries += 1
            self._again.put_nowait(ask)
        else:
            self._deliver(ask, JudgeError(f"{failure}, {MAX_ATTEMPTS} times"))

    def _deliver(self, ask: _Ask, outcome: Outcome | Exception) -> None:
        if not ask.answer.done():
            ask.answer.set_result(outcome)

    async def _add_workers(self, num_workers: int) -> None:
        for _ in range(num_workers):
            for attempt in range(1, MAX_STARTS + 1):
                try:
                    await self._add_worker()
                    break
                except WorkerDied:
                    if attempt == MAX_STARTS:
                        raise

    async def _add_worker(self) -> None:
        worker = await WorkerProcess.start(self._setup, START_DEADLINE_S)
        self._workers.add(worker)
        if self._is_closed:
            await worker.end()
        self._ready.put_nowait(worker)

    def _watch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine of the crew's; its failure is the crew's."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())

    def _fail(self, cause: BaseException | None) -> None:
        """Everyone waiting now, and everyone who asks later, gets CrewError."""
        self._failure = self._failure or cause
        for ask in self._asks:
            if not ask.answer.done():
                ask.answer.set_exception(CrewError(f"the verifier pool has failed: {cause}"))

"""The pool's workers as one: takes jobs, gives outcomes, whatever happens to a worker.

    jobs ──▶ lanes [num_workers] ──▶ a ready worker each
                    │ no answer within PATIENCE_S: the worker keeps the job, at low priority, and the lane goes on with
                    another └ the deadline passes, or the worker dies: end it, fork another, ask once more ──▶ retry
                    lane

A lane waits for a job, then for a ready worker, then at most PATIENCE_S for the answer. A worker is ready again when it
has answered; one that is ended is replaced at once. At most `num_slow` workers hold slow jobs beside the lanes' own:
only when all of them do must a lane wait, until a deadline frees one. Retries have a lane of their own: first attempts
never wait for them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

import msgspec

from verifiers.nursery import NurseryDied, Worker, WorkerNursery
from verifiers.pool_metrics import PoolMetrics
from verifiers.registry import GoldError, JudgeError, Outcome
from verifiers.types import RewardSpec
from verifiers.wire import Job, Result, Setup, WireError, encode

PATIENCE_S = 0.15
MAX_NURSERIES = 3


class CrewError(RuntimeError):
    """The workers cannot go on; the message says why."""


class _Ask:
    """A job on its way, and who waits for it."""

    def __init__(self, job: Job, answer: asyncio.Future[Outcome | Exception]) -> None:
        self.job, self.answer = job, answer


def _outcome(result: Result) -> Outcome | Exception:
    if result.outcome is not None:
        return result.outcome
    return GoldError(result.error) if result.is_bad_row else JudgeError(result.error)


class Crew:
    """Workers for `num_workers` jobs at a time, and for up to `num_slow` more that take long."""

    def __init__(self, num_workers: int, num_slow: int, setup: Setup, deadline_s: float, metrics: PoolMetrics) -> None:
        self._num_workers, self._num_slow = num_workers, num_slow
        self._setup, self._deadline_s, self._metrics = setup, deadline_s, metrics
        self._nursery = WorkerNursery(setup)
        self._num_nurseries = 0
        self._renewal = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._first: asyncio.Queue[_Ask] = asyncio.Queue()
        self._again: asyncio.Queue[_Ask] = asyncio.Queue()
        self._ready: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._slow: dict[Worker, bool] = {}
        """Workers that keep a slow job, and whether the lane got another in their place."""
        self._retry_slots = asyncio.Semaphore(max(1, num_slow))
        self._tasks: set[asyncio.Task[None]] = set()
        self._asks: set[_Ask] = set()
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """Return when every worker is ready; NurseryDied where what they need cannot be imported or fails its
        self-test.
        """
        try:
            await self._renew_nursery()
            for _ in range(self._num_workers):
                await self._add_worker()
        # Cancelled or failed, what was started must not stay.
        except BaseException:
            await self.close()
            raise
        for _ in range(self._num_workers):
            self._watch(self._run_lane())
        self._watch(self._run_retries())

    async def score(self, response: str, spec: RewardSpec, progress: float | None) -> Outcome | Exception:
        """The outcome of one response, or the exception to report as its fault. CrewError where the crew has failed."""
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
        """End every worker and task; whoever waits gets CrewError. Idempotent."""
        self._fail(CrewError("it was closed"))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in list(self._workers):
            await self._nursery.end(worker)
        self._workers.clear()
        await self._nursery.close()

    async def _run_lane(self) -> None:
        while True:
            ask = await self._first.get()
            if ask.answer.done():
                continue
            worker = await self._ready.get()
            while worker.reader.at_eof():
                await self._retire(worker)
                worker = await self._ready.get()
            attempt = self._watch(self._attempt(ask, worker, is_first=True))
            await asyncio.wait({attempt}, timeout=PATIENCE_S)

    async def _run_retries(self) -> None:
        while True:
            ask = await self._again.get()
            await self._retry_slots.acquire()
            self._watch(self._retry(ask))

    async def _retry(self, ask: _Ask) -> None:
        try:
            worker = await self._fork()
            worker.yield_cpu()
            await self._attempt(ask, worker, is_first=False)
        finally:
            self._retry_slots.release()

    async def _attempt(self, ask: _Ask, worker: Worker, is_first: bool) -> None:
        """One job on one worker. Afterwards the worker is ready again, or ended and, where needed, replaced."""
        loop = asyncio.get_running_loop()
        detach = loop.call_later(PATIENCE_S, self._detach, worker) if is_first else None
        failure, result = "", None
        try:
            async with asyncio.timeout(self._deadline_s):
                result = await worker.ask(ask.job)
        except TimeoutError:
            failure = f"no answer within rewards.deadline_s = {self._deadline_s:g} s"
        except (WireError, OSError) as error:
            failure = str(error)
        # What counts is whether `_detach` ran, not whether its time has come: cancelled when due, it has replaced nobody.
        if detach is not None:
            detach.cancel()
        if result is not None:
            self._metrics.num_by_workers += 1
            self._deliver(ask, _outcome(result))
            if is_first and worker not in self._slow and not result.is_spent:
                self._ready.put_nowait(worker)
                return
        how = await (self._retire(worker) if is_first else self._end(worker))
        if ask.answer.done():
            return
        if is_first:
            self._metrics.num_retries += 1
            self._again.put_nowait(ask)
        else:
            self._deliver(ask, JudgeError(f"{how or failure} (second attempt)"))

    def _detach(self, worker: Worker) -> None:
        """A slow job keeps its worker; the lane gets another, while the limit allows."""
        worker.yield_cpu()
        is_replaced = len(self._slow) < self._num_slow
        self._slow[worker] = is_replaced
        if is_replaced:
            self._watch(self._add_worker())

    async def _retire(self, worker: Worker) -> str:
        """End a worker; how it had ended, if by itself. It is replaced unless that happened when it became slow."""
        is_replaced = self._slow.pop(worker, False)
        how = await self._end(worker)
        if not is_replaced:
            await self._add_worker()
        return how

    async def _end(self, worker: Worker) -> str:
        how = await self._nursery.end(worker)
        self._workers.discard(worker)
        self._metrics.num_restarts += 1
        return how

    def _deliver(self, ask: _Ask, outcome: Outcome | Exception) -> None:
        if not ask.answer.done():
            ask.answer.set_result(outcome)

    async def _add_worker(self) -> None:
        self._ready.put_nowait(await self._fork())

    async def _fork(self) -> Worker:
        while True:
            nursery = self._nursery
            try:
                worker = await nursery.spawn()
                break
            except NurseryDied as error:
                await self._renew_nursery(nursery, error)
        self._workers.add(worker)
        return worker

    async def _renew_nursery(self, broken: WorkerNursery | None = None, cause: Exception | None = None) -> None:
        """Start the nursery, or another in place of a broken one; its workers ended with it and are replaced as they
        are missed.
        """
        async with self._renewal:
            if broken is not None and broken is not self._nursery:
                return
            if self._num_nurseries == MAX_NURSERIES:
                raise CrewError(f"the nursery of verifier workers ended {MAX_NURSERIES} times: {cause}")
            self._num_nurseries += 1
            await self._nursery.close()
            self._nursery = WorkerNursery(self._setup)
            await self._nursery.start()

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

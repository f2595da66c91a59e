"""The pool's workers as one: takes jobs, gives outcomes, whatever happens to a worker.

    jobs ──▶ lanes [num_workers] ──▶ a ready worker each
               │ no answer within PATIENCE_S: the worker keeps the job, at low priority, and the lane goes on with another
               └ the deadline passes, or the worker dies: end it, fork another, ask once more ──▶ retry lanes [num_slow]

A lane waits for a job, then for a ready worker, then at most PATIENCE_S for the answer. A worker is ready again when it has answered;
one that is ended is replaced at once. At most `num_slow` workers hold slow jobs beside the lanes' own: only when all of them do must
a lane wait, until a deadline frees one. Retries have lanes of their own: first attempts never wait for them.
"""

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

import msgspec

from verifiers.pool.figures import PoolMetrics
from verifiers.pool.fork_server import ForkServer, ForkServerDied, Worker
from verifiers.pool.frames import FrameError, Job, Result, Setup, encode
from verifiers.registry import GoldError, JudgeError, Outcome, Task
from verifiers.types import RewardSpec

PATIENCE_S = 0.15
MAX_FORK_SERVERS = 3


class LanesError(RuntimeError):
    """The workers cannot go on; the message says why."""


class _Ask:
    """A job on its way, and who waits for it."""

    def __init__(self, job: Job, answer: asyncio.Future[Outcome | Exception]) -> None:
        self.job, self.answer = job, answer


def _outcome(result: Result) -> Outcome | Exception:
    if result.outcome is not None:
        return result.outcome
    return GoldError(result.error) if result.is_bad_row else JudgeError(result.error)


class Lanes:
    """Workers for `num_workers` jobs at a time, and for up to `num_slow` more that take long."""

    def __init__(self, num_workers: int, num_slow: int, setup: Setup, deadline_s: float, metrics: PoolMetrics) -> None:
        self._num_workers, self._num_slow = num_workers, num_slow
        self._setup, self._deadline_s, self._metrics = setup, deadline_s, metrics
        self._server = ForkServer(setup)
        self._num_servers = 1
        self._renewal = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._first: asyncio.Queue[_Ask] = asyncio.Queue()
        self._again: asyncio.Queue[_Ask] = asyncio.Queue()
        self._ready: asyncio.Queue[Worker] = asyncio.Queue()
        self._workers: set[Worker] = set()
        self._slow: dict[Worker, bool] = {}
        """Workers that keep a slow job, and whether the lane got another in their place."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._asks: set[_Ask] = set()
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """Return when every worker is ready; ForkServerDied where what they need cannot be imported or fails its self-test."""
        try:
            await self._server.start()
            for _ in range(self._num_workers):
                await self._add_worker()
        # Cancelled or failed, what was started must not stay.
        except BaseException:
            await self.close()
            raise
        for _ in range(self._num_workers):
            self._watch(self._run_lane())
        for _ in range(max(1, self._num_slow)):
            self._watch(self._run_retry_lane())

    async def score(self, task: Task, spec: RewardSpec) -> Outcome | Exception:
        """The outcome of a task, whose row is `spec`, or the exception to report as its fault. LanesError where the lanes have
        failed."""
        if self._failure is not None:
            raise LanesError(f"the verifier pool has failed: {self._failure}") from self._failure
        try:
            context = task.context
            job = Job(next(self._numbers), task.response, spec, context.progress, context.image_sizes)
            encode(job)
        except (FrameError, TypeError, UnicodeEncodeError, msgspec.MsgspecError) as error:
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
        """End every worker and task; whoever waits gets LanesError. Idempotent."""
        self._fail(LanesError("it was closed"))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in list(self._workers):
            await self._server.end(worker)
        self._workers.clear()
        await self._server.close()

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

    async def _run_retry_lane(self) -> None:
        while True:
            ask = await self._again.get()
            worker = await self._fork()
            worker.yield_cpu()
            await self._attempt(ask, worker, is_first=False)

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
        except OSError as error:
            failure = str(error)
        # What counts is whether `_detach` ran, not whether its time has come: cancelled when due, it has replaced nobody.
        if detach is not None:
            detach.cancel()
        if result is not None:
            self._metrics.counts["num_by_workers"] += 1
            if not ask.answer.done():
                ask.answer.set_result(_outcome(result))
            if is_first and worker not in self._slow and not result.is_spent:
                self._ready.put_nowait(worker)
                return
        how = await (self._retire(worker) if is_first else self._end(worker))
        if ask.answer.done():
            return
        if is_first:
            self._metrics.counts["num_retries"] += 1
            self._again.put_nowait(ask)
        else:
            ask.answer.set_result(JudgeError(f"{how or failure} (second attempt)"))

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
        how = await self._server.end(worker)
        self._workers.discard(worker)
        self._metrics.counts["num_restarts"] += 1
        return how

    async def _add_worker(self) -> None:
        self._ready.put_nowait(await self._fork())

    async def _fork(self) -> Worker:
        while True:
            server = self._server
            try:
                worker = await server.spawn()
            except ForkServerDied as error:
                await self._replace(server, error)
            else:
                self._workers.add(worker)
                return worker

    async def _replace(self, broken: ForkServer, cause: ForkServerDied) -> None:
        """Start another fork server, once for all who met the broken one; its workers ended with it, and are replaced when missed."""
        async with self._renewal:
            if broken is not self._server:
                return
            if self._num_servers == MAX_FORK_SERVERS:
                raise LanesError(f"the fork server of verifier workers ended {MAX_FORK_SERVERS} times: {cause}")
            self._num_servers += 1
            await broken.close()
            self._server = ForkServer(self._setup)
            await self._server.start()

    def _watch(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine of the lanes'; its failure is theirs."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._fail(task.exception())

    def _fail(self, cause: BaseException | None) -> None:
        """Everyone waiting now, and everyone who asks later, gets LanesError."""
        self._failure = self._failure or cause
        for ask in self._asks:
            if not ask.answer.done():
                ask.answer.set_exception(LanesError(f"the verifier pool has failed: {cause}"))

"""The verifier pool: verdicts for groups of responses, that no response can stall, crash or fool.

Used by the verifier pool actor and by `python -m verifiers.serve`. What is bounded by a response's length (detection,
and the answers that need no sympy) is scored in this process, in one thread beside the event loop; everything else goes
to supervised workers (verifiers.crew). Equal questions are judged once: while one is on its way, and afterwards from a
bounded cache.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from verifiers.breaker import CircuitBreaker
from verifiers.crew import Crew
from verifiers.pool_metrics import PoolMetrics
from verifiers.registry import Outcome, Task
from verifiers.scoring import Batch, Routed, route, score_batch
from verifiers.types import RewardOptions, RewardSpec, Verdict
from verifiers.wire import Setup
from verifiers.worker import SelfTestError

DEFAULT_MEMORY_LIMIT_BYTES = 1024**3
T = TypeVar("T")
MAX_CACHED = 65_536
# Longer questions are not remembered: the cache stays under MAX_CACHED × this many characters.
MAX_CACHED_CHARS = 1_024

_BOX = "[{'bbox_2d': [0, 0, 10, 10], 'label': 'a'}]"
_FRONT_SPEC = RewardSpec(ground_truth=_BOX, verifier="detection", verifier_parm={"det_reward_ratio": {"map": 1.0}})


class VerifierPool:
    """Scores batches of responses. One per process; bound to the event loop that starts it.

    num_workers           worker processes that score at the same time
    options               every option that changes a score; its deadline and length limit are the next arguments'
    defaults
    deadline_s            seconds a response may take in a worker, on each of at most two attempts
    memory_limit_bytes    address space of a worker
    max_response_chars    a longer response is a bad answer
    num_slow              workers that may hold slow jobs beside the num_workers
    fault_limit           share of faults among a source's latest verdicts from which `score` raises FaultRateError
    preload               verifiers that workers import before their first job
    """

    def __init__(
        self,
        num_workers: int = 1,
        options: RewardOptions | None = None,
        deadline_s: float | None = None,
        memory_limit_bytes: int = DEFAULT_MEMORY_LIMIT_BYTES,
        max_response_chars: int | None = None,
        *,
        num_slow: int = 16,
        fault_limit: float = 0.25,
        preload: Sequence[str] = ("mathverify",),
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
        chosen = options or RewardOptions()
        self.options = msgspec.structs.replace(
            chosen,
            deadline_s=deadline_s or chosen.deadline_s,
            max_response_chars=max_response_chars or chosen.max_response_chars,
        )
        self._metrics = PoolMetrics()
        self._breaker = CircuitBreaker(fault_limit)
        setup = Setup(self.options, memory_limit_bytes, tuple(preload))
        self._crew = Crew(num_workers, num_slow, setup, self.options.deadline_s, self._metrics)
        self._front = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verifier-front")
        self._known: OrderedDict[tuple[Hashable, ...], Outcome] = OrderedDict()
        self._on_their_way: dict[tuple[Hashable, ...], asyncio.Task[Outcome | Exception]] = {}

    async def start(self) -> None:
        """Return when the kernels are compiled and every worker has told a right answer from a wrong one.

        Raises SelfTestError or NurseryDied, with nothing left running.
        """
        try:
            await asyncio.gather(self._crew.start(), self._in_front(self._test_front))
        # Cancelled or failed, what was started must not stay.
        except BaseException:
            await self.close()
            raise

    async def score(
        self,
        responses: Sequence[str],
        spec_list: Sequence[RewardSpec],
        progress: float | None = 1.0,
        sources: Sequence[str] | None = None,
    ) -> list[Verdict]:
        """Verdicts in the order of the responses; `progress` None means evaluation. `sources` names each sample's data
        source.

        FaultRateError where a source's faults pass the limit, CrewError where the pool is closed or cannot start
        workers.
        """
        started_s = time.monotonic()
        routed = route(responses, spec_list, progress, options=self.options)
        await asyncio.gather(*(self._settle_batch(routed, batch, progress) for batch in routed.batches.values()))
        verdicts = routed.complete()
        named = ["" for _ in responses] if sources is None else sources
        for response, spec, verdict, source in zip(responses, spec_list, verdicts, named, strict=True):
            self._metrics.record(spec.verifier, source, verdict, time.monotonic() - started_s)
            self._breaker.record(source, spec, response, verdict)
        for source in set(named):
            self._breaker.check(source)
        return verdicts

    def metrics(self) -> dict[str, float]:
        """Flat figures since the start: see PoolMetrics.snapshot; and `pool/num_waiting`, the jobs no worker has taken
        yet.
        """
        return {**self._metrics.snapshot(), "pool/num_waiting": float(self._crew.num_waiting)}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the living workers."""
        return self._crew.pids

    async def close(self) -> None:
        """End all workers and the thread. Idempotent; when it returns no process is left."""
        await self._crew.close()
        tasks = list(self._on_their_way.values())
        await asyncio.gather(*tasks, return_exceptions=True)
        self._front.shutdown(wait=True)

    async def _settle_batch(self, routed: Routed, batch: Batch, progress: float | None) -> None:
        if batch.implementation.is_bounded:
            self._metrics.num_in_front += len(batch.tasks)
            outcomes = await self._in_front(batch.implementation.score_batch, batch.tasks)
            for index, outcome in zip(batch.indices, outcomes, strict=True):
                routed.settle(index, outcome)
            return
        waiting = []
        for index, task in zip(batch.indices, batch.tasks, strict=True):
            known = batch.implementation.score_at_once(task)
            if known is None:
                waiting.append(self._settle_one(routed, batch, index, task, progress))
            else:
                self._metrics.num_in_front += 1
                routed.settle(index, known)
        await asyncio.gather(*waiting)

    async def _settle_one(self, routed: Routed, batch: Batch, index: int, task: Task, progress: float | None) -> None:
        spec = routed.specs[index]
        depends_on = batch.implementation.cache_key(task)
        key = None if depends_on is None else (spec.verifier, *depends_on)
        if key is None or sum(len(part) for part in key if isinstance(part, str)) > MAX_CACHED_CHARS:
            routed.settle(index, await self._crew.score(task.response, spec, progress))
            return
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            self._metrics.num_cached += 1
            routed.settle(index, known)
            return
        work = self._on_their_way.get(key)
        if work is None:
            work = self._on_their_way[key] = asyncio.create_task(self._judge(key, task.response, spec, progress))
        else:
            self._metrics.num_cached += 1
        # Shielded: a caller that gives up must not take the answer from the others who wait for it.
        routed.settle(index, await asyncio.shield(work))

    async def _judge(
        self, key: tuple[Hashable, ...], response: str, spec: RewardSpec, progress: float | None
    ) -> Outcome | Exception:
        try:
            outcome = await self._crew.score(response, spec, progress)
        finally:
            del self._on_their_way[key]
        if isinstance(outcome, Outcome):
            self._known[key] = outcome
            if len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
        return outcome

    async def _in_front(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._front, work, *arguments)

    def _test_front(self) -> None:
        """Compile or load the kernels, and check them on a right and a wrong answer."""
        right, wrong = f"<answer>{_BOX}</answer>", "<answer>[{'bbox_2d': [20, 20, 30, 30], 'label': 'a'}]</answer>"
        verdicts = score_batch([right, wrong], [_FRONT_SPEC] * 2, options=self.options)
        if [verdict.accuracy for verdict in verdicts] != [1.0, 0.0]:
            raise SelfTestError(f"detection judged a right and a wrong answer as {verdicts}")

"""The verifier pool: verdicts for groups of responses, that no response can stall, crash or fool.

Used by the verifier pool actor and by `python -m verifiers.serve`. What is bounded by a response's length (detection, and
the answers that need no sympy) is scored in this process, in one thread beside the event loop; everything else goes to supervised
workers (verifiers.pool.lanes). Equal questions are judged once: while one is on its way, and afterwards from a bounded cache.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from verifiers.pool.breaker import CircuitBreaker
from verifiers.pool.figures import PoolMetrics
from verifiers.pool.frames import Setup
from verifiers.pool.lanes import Lanes
from verifiers.pool.worker import SelfTestError
from verifiers.registry import GoldError, Outcome, Task
from verifiers.scoring import Batch, Routed, gold_problem, gold_response, route, score_batch
from verifiers.types import MAX_FAULT_RATE, MEMORY_GIB, ImageSize, RewardOptions, RewardSpec, Verdict

T = TypeVar("T")
MAX_CACHED = 65_536
# Longer questions are not remembered: the cache stays under MAX_CACHED × this many characters.
MAX_CACHED_CHARS = 1_024

_BOX = "[{'bbox_2d': [0, 0, 10, 10], 'label': 'a'}]"
# The frame is said, since that of the options may need the sizes of an image, and there is none.
_FRONT_PARM = {"det_reward_ratio": {"map": 1.0}, "frame": "original_px"}
_FRONT_SPEC = RewardSpec(ground_truth=_BOX, verifier="detection", verifier_parm=_FRONT_PARM)


class VerifierPool:
    """Scores batches of responses. One per process; bound to the event loop that starts it.

    num_workers           worker processes that score at the same time
    options               every option that changes a score
    memory_limit_bytes    address space of a worker
    num_slow              workers that may hold slow jobs beside the num_workers
    fault_limit           share of faults among a source's latest verdicts from which `score` raises FaultRateError
    preload               verifiers that workers import before their first job
    """

    def __init__(
        self,
        num_workers: int = 1,
        options: RewardOptions | None = None,
        *,
        memory_limit_bytes: int = int(MEMORY_GIB * 2**30),
        num_slow: int = 16,
        fault_limit: float = MAX_FAULT_RATE,
        preload: Sequence[str] = ("mathverify",),
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; it must be at least 1")
        self.options = options or RewardOptions()
        self._metrics = PoolMetrics()
        self._breaker = CircuitBreaker(fault_limit)
        setup = Setup(self.options, memory_limit_bytes, tuple(preload))
        self._lanes = Lanes(num_workers, num_slow, setup, self.options.deadline_s, self._metrics)
        self._front = ThreadPoolExecutor(max_workers=1, thread_name_prefix="verifier-front")
        self._known: OrderedDict[tuple[Hashable, ...], Outcome] = OrderedDict()
        self._on_their_way: dict[tuple[Hashable, ...], asyncio.Task[Outcome | Exception]] = {}

    async def start(self) -> None:
        """Return when the kernels are compiled and every worker has told a right answer from a wrong one.

        Raises SelfTestError or ForkServerDied, with nothing left running.
        """
        try:
            await asyncio.gather(self._lanes.start(), self._in_front(self._test_front))
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
        image_sizes: Sequence[Sequence[ImageSize]] | None = None,
    ) -> list[Verdict]:
        """Verdicts in the order of the responses; `progress` None means evaluation. `sources` names each sample's data source,
        `image_sizes` tells of each its prompt's images.

        FaultRateError where a source's faults pass the limit, LanesError where the pool is closed or cannot start workers.
        """
        started_s = time.monotonic()
        routed = route(responses, spec_list, progress, options=self.options, image_sizes=image_sizes)
        await asyncio.gather(*(self._settle_batch(routed, batch) for batch in routed.batches.values()))
        verdicts = routed.complete()
        named = ["" for _ in responses] if sources is None else sources
        for response, spec, verdict, source in zip(responses, spec_list, verdicts, named, strict=True):
            self._metrics.record(spec.verifier, source, verdict, time.monotonic() - started_s)
            self._breaker.record(source, spec, response, verdict)
        for source in set(named):
            self._breaker.check(source)
        return verdicts

    async def check_golds(
        self, specs: Sequence[RewardSpec], image_sizes: Sequence[Sequence[ImageSize]] | None = None
    ) -> list[str | None]:
        """`check_gold` of many rows, in order; a gold answer that hangs or crashes its verifier is a problem of its row alone.

        For a pool with `fault_limit` 1: bad rows are to be listed, not to stop their list.
        """
        found: dict[int, str | None] = {}
        responses: dict[int, str] = {}
        sizes = image_sizes or [()] * len(specs)
        for index, spec in enumerate(specs):
            try:
                responses[index] = gold_response(spec, options=self.options, image_sizes=sizes[index])
            except GoldError as error:
                found[index] = str(error)
        asked = [specs[index] for index in responses]
        verdicts = await self.score(list(responses.values()), asked, image_sizes=[sizes[index] for index in responses])
        for index, verdict in zip(responses, verdicts, strict=True):
            found[index] = gold_problem(specs[index], verdict)
        return [found[index] for index in range(len(specs))]

    def metrics(self) -> dict[str, float]:
        """Flat figures since the start: see PoolMetrics.snapshot; and `pool/num_waiting`, the jobs no worker has taken yet."""
        return {**self._metrics.snapshot(), "pool/num_waiting": float(self._lanes.num_waiting)}

    def take_metrics(self) -> dict[str, float]:
        """The same since the last call of this; for one reader."""
        return {**self._metrics.take(), "pool/num_waiting": float(self._lanes.num_waiting)}

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the living workers."""
        return self._lanes.pids

    async def close(self) -> None:
        """End all workers and the thread. Idempotent; when it returns no process is left."""
        await self._lanes.close()
        tasks = list(self._on_their_way.values())
        await asyncio.gather(*tasks, return_exceptions=True)
        self._front.shutdown(wait=True)

    async def _settle_batch(self, routed: Routed, batch: Batch) -> None:
        if batch.implementation.is_bounded:
            self._metrics.counts["num_in_front"] += len(batch.tasks)
            outcomes = await self._in_front(batch.implementation.score_batch, batch.tasks)
            for index, outcome in zip(batch.indices, outcomes, strict=True):
                routed.settle(index, outcome)
            return
        waiting = []
        for index, task in zip(batch.indices, batch.tasks, strict=True):
            known = batch.implementation.score_at_once(task)
            if known is None:
                waiting.append(self._settle_one(routed, batch, index, task))
            else:
                self._metrics.counts["num_in_front"] += 1
                routed.settle(index, known)
        await asyncio.gather(*waiting)

    async def _settle_one(self, routed: Routed, batch: Batch, index: int, task: Task) -> None:
        spec, depends_on = routed.specs[index], batch.implementation.cache_key(task)
        key = None if depends_on is None else (spec.verifier, *depends_on)
        if key is None or sum(len(part) for part in key if isinstance(part, str)) > MAX_CACHED_CHARS:
            outcome = await self._lanes.score(task, spec)
        elif key in self._known:
            self._known.move_to_end(key)
            self._metrics.counts["num_cached"] += 1
            outcome = self._known[key]
        else:
            work = self._on_their_way.get(key)
            if work is None:
                work = self._on_their_way[key] = asyncio.create_task(self._judge(key, task, spec))
            else:
                self._metrics.counts["num_cached"] += 1
            # Shielded: a caller that gives up must not take the answer from the others who wait for it.
            outcome = await asyncio.shield(work)
        routed.settle(index, outcome)

    async def _judge(self, key: tuple[Hashable, ...], task: Task, spec: RewardSpec) -> Outcome | Exception:
        try:
            outcome = await self._lanes.score(task, spec)
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

"""One held-out evaluation: every chosen row once per kind of sampling, at the version the generators hold. Called by the controller.

Evaluation leases carry negative ids: they are in neither ledger nor window, and the learner never sees them.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable

from vtriune.config.tree import Config
from vtriune.data.store import Store
from vtriune.fleet import Engine, Fleet
from vtriune.messages import GroupReport, Lease, Sampling
from vtriune.runtime import ConnectionLost, MeshFailure


class Evaluation:
    """Held-out rows of `store`, at most `evaluation.rows` of them, spread evenly over the sources."""

    def __init__(self, config: Config, store: Store, fleet: Fleet) -> None:
        self._config = config
        self._fleet = fleet
        self._ids = itertools.count(-1, -1)
        self._rows = [store.ref(row) for row in store.spread(config.evaluation.rows)]

    @property
    def num_rows(self) -> int:
        """Rows scored by each pass."""
        return len(self._rows)

    async def run(self, wait_for_engine: Callable[[], Awaitable[None]]) -> dict[str, float]:
        """Evaluate by every kind of `evaluation.sampling`. Raises what a generator raises, but for its death.

        `wait_for_engine` is awaited while no engine is alive; it brings one back.

        Returns `eval/<kind>/num_rows` and `eval/<kind>/num_faults`; the rewards are the recorder's to report, which has the
        groups themselves.
        """
        metrics: dict[str, float] = {}
        for kind in self._config.evaluation.sampling:
            reports = await self._pass(kind, wait_for_engine)
            metrics[f"eval/{kind}/num_rows"] = float(sum(len(report.rewards) for report in reports))
            metrics[f"eval/{kind}/num_faults"] = float(sum(report.num_faults for report in reports))
        return metrics

    async def _pass(self, kind: str, wait_for_engine: Callable[[], Awaitable[None]]) -> list[GroupReport]:
        """One report per row. A row whose generator died, or cannot be reached, goes to another one, under the same id: should both
        be scored, the recorder keeps one."""
        sampling = Sampling(
            temperature=1.0 if kind == "sampled" else 0.0,
            max_tokens=self._config.sampling.max_tokens,
            seed=self._config.run.seed if self._config.sampling.seeded else None,
        )
        waiting = deque(
            Lease(next(self._ids), 0, row, 1, sampling, purpose="evaluate", progress=1.0) for row in self._rows
        )
        running: dict[asyncio.Task[GroupReport], tuple[Lease, Engine]] = {}
        reports = []
        try:
            while waiting or running:
                engine = self._fleet.pick(1) if waiting else None
                if engine is not None:
                    lease = waiting.popleft()
                    self._fleet.reserve(engine, lease)
                    running[asyncio.create_task(self._fleet.generate(engine, lease))] = lease, engine
                elif not running:
                    await wait_for_engine()
                    continue
                done, _ = await asyncio.wait(
                    running, timeout=None if engine is None else 0, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    lease, engine = running.pop(task)
                    try:
                        reports.append(task.result())
                    except MeshFailure as failure:
                        self._fleet.bury(engine, str(failure).splitlines()[0])
                        waiting.append(lease)
                    except ConnectionLost:
                        waiting.append(lease)
            return reports
        finally:
            for task in running:
                task.cancel()

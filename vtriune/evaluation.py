"""One held-out evaluation: every chosen row once per kind of sampling, at the version the generators hold. Called by the controller.

Evaluation leases carry negative ids: they are in neither ledger nor window, and the learner never sees them.
"""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from statistics import fmean

from vtriune.config.tree import Config
from vtriune.data.store import Store
from vtriune.fleet import Fleet
from vtriune.messages import GroupReport, Lease, Sampling


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

    async def run(self, wait_for_room: Callable[[], Awaitable[None]]) -> dict[str, float]:
        """Evaluate by every kind of `evaluation.sampling`. Keys: `eval/<kind>/reward/mean`, `eval/<kind>/source/<s>/reward/mean`,
        and the first kind's again without its name. Raises what a generator raises."""
        metrics: dict[str, float] = {}
        for index, kind in enumerate(self._config.evaluation.sampling):
            reports = await self._pass(kind, wait_for_room)
            metrics |= summarise(reports, f"eval/{kind}")
            if index == 0:
                metrics |= summarise(reports, "eval")
        return metrics

    async def _pass(self, kind: str, wait_for_room: Callable[[], Awaitable[None]]) -> list[GroupReport]:
        sampling = Sampling(
            temperature=1.0 if kind == "sampled" else 0.0,
            max_tokens=self._config.sampling.max_tokens,
            seed=self._config.run.seed if self._config.sampling.seeded else None,
        )
        running: list[asyncio.Task[GroupReport]] = []
        try:
            for sample in self._rows:
                while (engine := self._fleet.pick(1)) is None:
                    await wait_for_room()
                lease = Lease(next(self._ids), 0, sample, 1, sampling, purpose="evaluate", progress=1.0)
                running.append(asyncio.create_task(self._fleet.generate(engine, lease)))
                await asyncio.sleep(0)
            return list(await asyncio.gather(*running))
        finally:
            for task in running:
                task.cancel()


def summarise(reports: Sequence[GroupReport], prefix: str) -> dict[str, float]:
    """Mean reward over all rows and per source; rows whose verdict is a fault are left out and counted."""
    by_source: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        by_source[report.source].extend(report.rewards)
    rewards = [reward for values in by_source.values() for reward in values]
    means = {f"{prefix}/source/{source}/reward/mean": fmean(values) for source, values in by_source.items() if values}
    return {
        f"{prefix}/reward/mean": fmean(rewards) if rewards else 0.0,
        f"{prefix}/num_rows": float(len(rewards)),
        f"{prefix}/num_faults": float(sum(report.num_faults for report in reports)),
        **means,
    }

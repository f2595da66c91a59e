"""One group sampled by several generators at once: what the tail of a batch is shared out with. Used by the generator.

    home ──┬── its own share ───────────────────┐
           ├── sample(lease of a share) ─▶ other ─┤─▶ one group, completions in order ─▶ verifiers
           └── sample(lease of a share) ─▶ other ─┘

The share of a generator that fails is sampled at home, where the prompt's prefix is cached: no completion is lost.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from msgspec.structs import replace

from vtriune.messages import Group, Lease
from vtriune.roles import Generator
from vtriune.runtime import ActorError, ConnectionLost, MeshFailure

log = logging.getLogger(__name__)


def shares_of(lease: Lease, num_shares: int) -> list[Lease]:
    """`lease` cut into `num_shares` leases of consecutive completions, sizes differing by at most one; none is empty."""
    total, first = lease.num_completions, lease.first_completion
    edges = [total * index // num_shares for index in range(num_shares + 1)]
    return [
        replace(lease, first_completion=first + low, num_completions=high - low)
        for low, high in itertools.pairwise(edges)
        if high > low
    ]


async def sample_shared(
    lease: Lease, others: Sequence[Generator], sample: Callable[[Lease], Coroutine[Any, Any, Group]]
) -> Group:
    """The whole group, `sample` being this generator's own engine and `others` references to generators that help.

    Raises what `sample` raises; failures of others cost time only.
    """
    own, *lent = shares_of(lease, 1 + len(others))

    async def lend(other: Generator, share: Lease) -> Group:
        try:
            return await other.sample.call_one(share)
        except (MeshFailure, ConnectionLost, ActorError) as error:
            log.warning("group %d: a share is sampled at home: %s", lease.group_id, str(error).splitlines()[0])
            return await sample(share)

    shares = [sample(own), *(lend(other, share) for other, share in zip(others, lent, strict=False))]
    tasks = [asyncio.ensure_future(share) for share in shares]
    try:
        groups = await asyncio.gather(*tasks)
    finally:
        # A failure at home leaves nobody sampling for a group that is lost.
        for task in tasks:
            task.cancel()
    return replace(
        groups[0],
        lease=lease,
        trajectories=[trajectory for group in groups for trajectory in group.trajectories],
        generation_s=max(group.generation_s for group in groups),
    )

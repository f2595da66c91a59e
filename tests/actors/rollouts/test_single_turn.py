"""A group shared between generators is the group one generator would have sampled."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.rollouts.single_turn import sample_shared, shares_of
from tests.actors.worlds import lease
from vtriune.messages import Group, Lease, Trajectory, VersionSpan
from vtriune.runtime import ActorError, ConnectionLost, MeshFailure
from vtriune.transport.wire import FailureNote

DEAD = MeshFailure(FailureNote("generator-1", 0, "host", 42, "exit", detail="killed by SIGKILL"))
CUT = ConnectionLost("the connection to generator-1 broke during sample")
REFUSED = ActorError("sample at generator-1", "actors.engine.loop.EngineError", "the engine has stopped", "")


def sampled(share: Lease, rank: int) -> Group:
    """Completion i has the one token i."""
    indices = range(share.first_completion, share.first_completion + share.num_completions)
    trajectories = [
        Trajectory(np.asarray([i], np.int32), np.zeros(1, np.float32), [VersionSpan(3, 1)], "stop", str(i))
        for i in indices
    ]
    return Group(share, np.arange(4, dtype=np.int32), trajectories, rank, generation_s=float(rank))


class Other:
    """A generator elsewhere: `sample.call_one` answers, or raises `error`."""

    def __init__(self, rank: int, error: Exception | None = None) -> None:
        self.sample, self.rank, self.error = self, rank, error
        self.shares: list[Lease] = []

    async def call_one(self, share: Lease) -> Group:
        self.shares.append(share)
        if self.error is not None:
            raise self.error
        return sampled(share, self.rank)


@given(st.integers(1, 64), st.integers(1, 80))
def test_shares_are_consecutive_even_and_never_empty(num_completions: int, num_shares: int) -> None:
    shares = shares_of(lease(1, 0, num_completions), num_shares)
    sizes = [share.num_completions for share in shares]
    assert sum(sizes) == num_completions
    assert len(sizes) == min(num_shares, num_completions)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert [share.first_completion for share in shares] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize("error", [None, DEAD, CUT, REFUSED])
@pytest.mark.parametrize("num_others", [0, 1, 2, 9])
async def test_a_shared_group_is_whole_and_in_order_whatever_becomes_of_the_others(
    error: Exception | None, num_others: int
) -> None:
    at_home: list[Lease] = []

    async def sample(share: Lease) -> Group:
        at_home.append(share)
        return sampled(share, 0)

    others: list[Any] = [Other(1 + rank, error if rank == 0 else None) for rank in range(num_others)]
    whole = lease(7, 0, 8)
    group = await sample_shared(whole, others, sample)
    assert group.lease == whole
    assert [trajectory.text for trajectory in group.trajectories] == [str(i) for i in range(8)]
    assert group.generator == 0
    lent = sum(share.num_completions for other in others for share in other.shares if other.error is None)
    assert sum(share.num_completions for share in at_home) == 8 - lent


async def test_what_fails_at_home_fails_the_group() -> None:
    async def sample(share: Lease) -> Group:
        raise RuntimeError("the engine has stopped")

    with pytest.raises(RuntimeError, match="engine has stopped"):
        await sample_shared(lease(7, 0, 8), [Other(1)], sample)  # type: ignore[list-item]

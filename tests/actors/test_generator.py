"""What a generator does with a sampled group while verifier processes come and go."""

import logging
from typing import Any

import msgspec
import numpy as np
import pytest

from actors.generator import Generator, NotReady
from tests.actors.worlds import lease
from vtriune.config.tree import Config
from vtriune.messages import SCORED_AGAIN, Group, GroupReport
from vtriune.runtime import ActorError, ConnectionLost, MeshFailure
from vtriune.transport.wire import FailureNote

GROUP = Group(lease(5, 0), np.arange(3, dtype=np.int32), [], 0)
REPORT = GroupReport(5, 0, 0, [], 0, 0.0)
DEAD = MeshFailure(FailureNote("verifiers", 1, "host", 42, "exit", detail="killed by SIGKILL"))
CUT = ConnectionLost("the connection to verifiers rank 0 broke during score")


class Verifiers:
    """A mesh whose `score.choose` goes through `outcomes`."""

    def __init__(self, *outcomes: Any) -> None:
        self.score = self
        self.outcomes = list(outcomes)
        self.seen: list[Group] = []

    async def choose(self, group: Group) -> GroupReport:
        self.seen.append(group)
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome  # type: ignore[no-any-return]


def generator(verifiers: Verifiers, **policy: Any) -> Generator:
    from vtriune.config.tree import Policy

    return Generator(Config(policy=Policy(**policy)), [], verifiers, 0)  # type: ignore[arg-type]


async def test_a_group_whose_verifier_dies_or_is_cut_off_is_scored_again(caplog: pytest.LogCaptureFixture) -> None:
    verifiers = Verifiers(DEAD, CUT, REPORT)
    with caplog.at_level(logging.WARNING):
        assert await generator(verifiers)._scored(GROUP) is REPORT
    # Each under a name of its own: what one verifier had delivered to some learner ranks is not what another delivers to all.
    assert [group.lease.attempt for group in verifiers.seen] == [0, SCORED_AGAIN, 2 * SCORED_AGAIN]
    assert all(group.lease.group_id == 5 and group.trajectories is GROUP.trajectories for group in verifiers.seen)
    (record,) = caplog.records
    assert record.getMessage().startswith("group 5 is scored again")


async def test_an_evaluation_row_that_is_scored_again_keeps_its_name() -> None:
    verifiers = Verifiers(DEAD, REPORT)
    group = Group(msgspec.structs.replace(GROUP.lease, purpose="evaluate"), GROUP.prompt_ids, [], 0)
    await generator(verifiers)._scored(group)
    assert verifiers.seen == [group, group]


async def test_the_wait_for_a_verifier_ends_with_the_lease() -> None:
    with pytest.raises(MeshFailure):
        await generator(Verifiers(*[DEAD] * 5), lease_s=0.06)._scored(GROUP)


async def test_any_other_remote_error_goes_on_to_the_controller_at_once() -> None:
    refused = ActorError("score at verifiers", "vtriune.data.schema.DataError", "row of other data", "")
    with pytest.raises(ActorError, match="row of other data"):
        await generator(Verifiers(refused, REPORT))._scored(GROUP)


async def test_without_an_engine_every_endpoint_says_so() -> None:
    idle = generator(Verifiers())
    with pytest.raises(NotReady, match="call ready"):
        await idle.generate(lease(1, 0), [])
    with pytest.raises(NotReady):
        await idle.stats()
    await idle.__cleanup__(None)

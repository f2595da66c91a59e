"""One rank as blocking calls: orders wait for their groups, and calls before `connect` are refused."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from learner import rank as module
from learner.batch.examples import DeliveryError
from learner.learner import Learner
from learner.rank import LearnerRank, NotConnected
from tests.learner import runs, worlds
from vtriune.messages import Canary


@pytest.fixture
def world_and_rank(models: dict[str, Path]) -> tuple[worlds.World, list, LearnerRank]:
    """A connected rank around a learner whose prompts come from a world."""
    world = worlds.World()
    groups = worlds.random_groups(world, np.random.default_rng(0), 3)
    config = worlds.config_with(model={"path": str(models["qwen2_5_vl"])})
    rank = LearnerRank(config, [], rank=0, num_ranks=1)
    rank._learner = Learner(config, worlds.make_policy(models["qwen2_5_vl"], freeze=("vit", "connector")), world)
    return world, groups, rank


def test_an_order_that_overtakes_its_groups_waits_for_them(world_and_rank: tuple) -> None:
    _, groups, rank = world_and_rank
    rank.deliver(groups[0])
    late = threading.Thread(target=lambda: (time.sleep(0.3), [rank.deliver(group) for group in groups[1:]]))
    late.start()
    report = rank.train(runs.order_of(groups))
    late.join()
    assert report.metrics["updates/done"] == 1


def test_a_group_that_never_comes_is_named_after_the_deadline(
    world_and_rank: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, groups, rank = world_and_rank
    monkeypatch.setattr(module, "DELIVERY_DEADLINE_S", 0.05)
    rank.deliver(groups[0])
    with pytest.raises(DeliveryError, match=r"\[1, 2\]"):
        rank.train(runs.order_of(groups))


def test_the_canary_is_scored_as_training_scores_it(world_and_rank: tuple) -> None:
    _, groups, rank = world_and_rank
    group = groups[2]
    learner, update, _, _ = runs.prepared(rank.learner.policy, rank.learner.prompts.source, groups)
    expected = runs.scores_of(learner, update)[2, 1][0]
    scored = rank.canary(Canary(group.group.lease.sample, group.group.trajectories[1].token_ids))
    torch.testing.assert_close(torch.tensor(scored), expected, rtol=1e-5, atol=1e-5)


def test_calls_before_connect_say_what_to_do() -> None:
    rank = LearnerRank(worlds.config_with(), [], rank=0, num_ranks=1)
    for call in (lambda: rank.save("unused"), lambda: rank.open_rendezvous(2)):
        with pytest.raises(NotConnected, match="connect"):
            call()

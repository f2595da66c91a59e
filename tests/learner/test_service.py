"""One rank as blocking calls: orders wait for their groups, and calls before `connect` are refused."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from learner import service as module
from learner.examples import DeliveryError
from learner.learner import Learner
from learner.service import LearnerService, NotReady
from tests.learner import runs, worlds
from vtriune.messages import Canary


@pytest.fixture
def world_and_service(models: dict[str, Path]) -> tuple[worlds.World, list, LearnerService]:
    """A connected service around a learner whose prompts come from a world."""
    world = worlds.World()
    groups = worlds.random_groups(world, np.random.default_rng(0), 3)
    config = worlds.config_with(model={"path": str(models["qwen2_5_vl"])})
    service = LearnerService(config, "unused", [], rank=0, num_ranks=1)
    service._learner = Learner(config, worlds.make_policy(models["qwen2_5_vl"], freeze=("vit", "connector")), world)
    return world, groups, service


def test_an_order_that_overtakes_its_groups_waits_for_them(world_and_service: tuple) -> None:
    _, groups, service = world_and_service
    service.deliver(groups[0])
    late = threading.Thread(target=lambda: (time.sleep(0.3), [service.deliver(group) for group in groups[1:]]))
    late.start()
    report = service.train(runs.order_of(groups))
    late.join()
    assert report.metrics["updates/done"] == 1


def test_a_group_that_never_comes_is_named_after_the_deadline(
    world_and_service: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, groups, service = world_and_service
    monkeypatch.setattr(module, "DELIVERY_DEADLINE_S", 0.05)
    service.deliver(groups[0])
    with pytest.raises(DeliveryError, match=r"\[1, 2\]"):
        service.train(runs.order_of(groups))


def test_the_canary_is_scored_as_training_scores_it(world_and_service: tuple) -> None:
    _, groups, service = world_and_service
    group = groups[2]
    learner, update, _, _ = runs.prepared(service.learner.policy, service.learner.prompts.source, groups)
    expected = runs.scores_of(learner, update)[2, 1][0]
    scored = service.canary(Canary(group.group.lease.sample, group.group.trajectories[1].token_ids))
    torch.testing.assert_close(torch.tensor(scored), expected, rtol=1e-5, atol=1e-5)


def test_calls_before_connect_say_what_to_do() -> None:
    service = LearnerService(worlds.config_with(), "unused", [], rank=0, num_ranks=1)
    for call in (service.ready, lambda: service.open_rendezvous(2)):
        with pytest.raises(NotReady, match="connect"):
            call()

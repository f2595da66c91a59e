"""`model.compile` and `model.offload` change where and how the same numbers are computed, never the numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from learner.learner import Learner
from learner.model import build as module
from tests.learner import ranks_program as program
from tests.learner import runs, worlds
from vtriune.config.tree import Model


@pytest.mark.timeout(600)
def test_compiled_blocks_give_the_log_probs_and_gradients_of_plain_ones(tmp_path: Path) -> None:
    # One layer, text only, one pack: compiling is what takes the time here.
    folder = worlds.write_model(tmp_path, "qwen3", num_layers=1)
    world = worlds.World()
    groups = worlds.random_groups(world, np.random.default_rng(0), 2, images="none")
    scores, gradients = runs.our_update(worlds.make_policy(folder), world, groups, model={"freeze": []})
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    policy = worlds.make_policy(folder, compile=True)
    found, found_gradients = runs.our_update(policy, world, groups, model={"freeze": []})
    # With and without gradients: the block and its attention module, each before and after the one call that is not traced.
    assert counters["stats"]["unique_graphs"] == 8
    assert len(counters["graph_break"]) == 1, counters["graph_break"]
    assert runs.worst_score_error(found, scores) < 1e-5
    assert runs.relative_gradient_error(found_gradients, gradients) < 1e-5


def test_blocks_trace_without_a_break_but_for_the_attention_call_itself(tmp_path: Path) -> None:
    # What a pack's structure makes on first use must be there before: inside a compiled block it would break the graph.
    folder = worlds.write_model(tmp_path, "qwen3", num_layers=1)
    world = worlds.World()
    groups = worlds.random_groups(world, np.random.default_rng(0), 2, images="none")
    policy = worlds.make_policy(folder, attention="flex")
    learner, update, *_ = runs.prepared(policy, world, groups, model={"freeze": []})
    expected = runs.scores_of(learner, update)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for block in policy.family.blocks(policy.model):
        block.compile(dynamic=True, backend="eager")
    learner, update, *_ = runs.prepared(policy, world, groups, model={"freeze": []})
    assert runs.worst_score_error(runs.scores_of(learner, update), expected) < 1e-5
    assert len(counters["graph_break"]) == 1, counters["graph_break"]
    assert "torch.compiler.disable" in next(iter(counters["graph_break"]))


def offloading(folder: Path, offload: str) -> Learner:
    learner, _ = program.a_learner(folder, None)
    config = worlds.config_with(
        model={"path": str(folder), "freeze": ["vit", "connector"], "offload": offload},
        optimizer={"token_budget": 60, "lr": 1e-2, "warmup": 0.0},
    )
    return Learner(config, worlds.make_policy(folder, freeze=("vit", "connector")), learner.prompts.source)


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_offloading_trains_the_same_parameters_bit_for_bit(models: dict[str, Path], offload: str) -> None:
    plain, groups = program.a_learner(models["qwen2_5_vl"], None)
    offloaded = offloading(models["qwen2_5_vl"], offload)
    for learner in (plain, offloaded):
        program.steps(learner, groups, 0, 2)
    expected = program.parameters_of(plain)
    assert all(torch.equal(expected[name], value) for name, value in program.parameters_of(offloaded).items())


def test_adams_moments_are_with_the_parameters_for_the_step_only(models: dict[str, Path]) -> None:
    learner = offloading(models["qwen2_5_vl"], "optimizer")
    optimizer, moves = learner.optimizer, []
    original, step = optimizer._move_state, optimizer.adamw.step
    optimizer._move_state = lambda *, to_host: moves.append(to_host) or original(to_host=to_host)  # type: ignore[method-assign]
    optimizer.adamw.step = lambda: moves.append("step") or step()  # type: ignore[method-assign]
    for parameter in learner.policy.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step(0, 10)
    assert moves == [False, "step", True]
    assert learner.optimizer._keeps_state_on_host
    assert not offloading(models["qwen2_5_vl"], "none").optimizer._keeps_state_on_host


@pytest.mark.parametrize(
    ("offload", "device", "expected"),
    [("all", "cuda", CPUOffloadPolicy), ("optimizer", "cuda", OffloadPolicy), ("all", "cpu", OffloadPolicy)],
)
def test_every_sharded_unit_gets_the_offload_policy(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, offload: Any, device: str, expected: type
) -> None:
    given: dict[int, Any] = {}
    monkeypatch.setattr(module, "fully_shard", lambda unit, **settings: given.setdefault(id(unit), settings))
    monkeypatch.setattr(module, "register_fsdp_forward_method", lambda unit, name: None)
    policy = worlds.make_policy(models["qwen2_5_vl"])
    mesh: Any = object()
    module.shard(policy, mesh, Model(offload=offload), torch.device(device))
    units = [*policy.family.blocks(policy.model), policy]
    assert given.keys() == {id(unit) for unit in units}
    assert all(type(settings["offload_policy"]) is expected for settings in given.values())

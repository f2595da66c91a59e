"""What each of several learner ranks does in the tests of `test_ranks`: scenarios by name, results saved by rank 0."""

import multiprocessing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from learner import hugging_face, state
from learner.learner import Learner
from learner.model import build_model, materialise, shard
from learner.policy import Policy
from learner.ranks import Ranks
from learner.tally import Tally
from tests.learner import runs, worlds
from vtriune.config.tree import Model
from vtriune.messages import ScoredGroup, TrainOrder

Scenario = tuple[worlds.World, list[ScoredGroup], tuple[str, ...]]
TOWER = ("vit", "connector")


def scenarios() -> dict[str, Scenario]:
    """World, groups and frozen modules of each update that is compared."""
    result: dict[str, Scenario] = {}
    for name, frozen in (("frozen_tower", TOWER), ("trained_tower", ())):
        world, rng = worlds.World(), np.random.default_rng(0)
        result[name] = (world, worlds.random_groups(world, rng, 6), frozen)
        # The plan places the heavier group first: the one with images goes to rank 0, the text to rank 1.
        world, rng = worlds.World(), np.random.default_rng(1)
        rows = [world.add(rng, 30, [(4, 8), (6, 2)]), world.add(rng, 8, [])]
        groups = [
            worlds.scored_group(
                i,
                world.features[row].prompt_ids,
                [rng.integers(6, worlds.VOCAB, 5) for _ in range(3)],
                [0.0, 1.0, 0.5],
                row=row,
            )
            for i, row in enumerate(rows)
        ]
        result[f"{name}_images_on_one_rank"] = (world, groups, frozen)
        result[f"{name}_one_group"] = (world, groups[:1], frozen)
    return result


def gradients(folder: Path, scenario: Scenario, mesh: Any) -> dict[str, torch.Tensor]:
    """Whole gradients of one update; `mesh` None: unsharded."""
    world, groups, frozen = scenario
    config = worlds.config_with(model={"path": str(folder), "freeze": list(frozen)}, optimizer={"token_budget": 60})
    policy = worlds.make_policy(folder, freeze=frozen)
    if mesh is not None:
        shard(policy, mesh, config.model, torch.device("cpu"))
    learner = Learner(config, policy, world, group=None if mesh is None else mesh.get_group())
    for group in groups:
        learner.deliver(group)
    order = runs.order_of(groups)
    tally = Tally(sorted({group.source for group in groups}))
    update = learner._prepare(learner.inbox.take(order.updates[0], order.attempts), order, tally)
    learner._accumulate(update, order, tally, None)
    return {n: whole(p.grad) for n, p in policy.model.named_parameters() if p.grad is not None}


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def steps(learner: Learner, groups: list[ScoredGroup], first: int, num: int) -> list[dict[str, float]]:
    """`num` versions of two updates each, on the same groups."""
    reports = []
    for version in range(first, first + num):
        learner.inbox.restore({"consumed": [], "open_from": 0})
        for group in groups:
            learner.deliver(group)
        reports.append(learner.train(TrainOrder(0, [[0, 1, 2], [3, 4, 5]], 0, "none", 2 * version, 100)).metrics)
    return reports


def a_learner(folder: Path, mesh: Any) -> tuple[Learner, list[ScoredGroup]]:
    world, groups, frozen = scenarios()["frozen_tower"]
    # Two groups without variance: they run forward only, after the others' backward.
    for index in (1, 4):
        flat = [msgspec.structs.replace(verdict, reward=0.5) for verdict in groups[index].verdicts]
        groups[index] = msgspec.structs.replace(groups[index], verdicts=flat)
    config = worlds.config_with(
        model={"path": str(folder), "freeze": list(frozen)}, optimizer={"token_budget": 60, "lr": 1e-2, "warmup": 0.0}
    )
    policy = worlds.make_policy(folder, freeze=frozen)
    if mesh is not None:
        shard(policy, mesh, config.model, torch.device("cpu"))
    return Learner(config, policy, world, group=None if mesh is None else mesh.get_group()), groups


KINDS = ("qwen2_5_vl", "untied", "qwen3_vl", "qwen3")


def loaded(models: Path, mesh: Any) -> dict[str, Any]:
    """Every family built without values, sharded, then read: whole values by name, and how many numbers this rank read of how many."""
    num_read = 0
    read = hugging_face._rows_of

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal num_read
        part = read(*arguments)
        num_read += part.numel()
        return part

    hugging_face._rows_of = counted
    found: dict[str, Any] = {}
    for kind in KINDS:
        num_read = 0
        section = Model(path=str(models / kind), dtype="float32", freeze=[])
        model, family = build_model(section, torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        policy = Policy(model, family, temperature=1.0, blocked_ids=[4])
        shard(policy, mesh, section, torch.device("cpu"))
        materialise(policy, model, section, torch.device("cpu"))
        values = {name: whole(p) for name, p in model.named_parameters(remove_duplicate=False)}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        total = sum(p.numel() for p in model.parameters())
        found[kind] = {"values": values | buffers, "read": num_read, "total": total, "blocked": policy.blocked_ids}
    hugging_face._rows_of = read
    return found


def parameters_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in learner.policy.model.named_parameters()}


def run_rank(rank: int, num_ranks: int, folder: Path, out: Path, ports: Any) -> None:
    """The process of one rank: every scenario's gradients, two versions trained, a checkpoint, two more, and a resumed one."""
    torch.set_num_threads(1)
    ranks = Ranks(rank, num_ranks)
    if rank == 0:
        port = ranks.open_store()
        for _ in range(num_ranks - 1):
            ports.put(port)
    else:
        port = ports.get()
    mesh = ranks.connect("127.0.0.1", port, torch.device("cpu"))
    by_kind = loaded(folder.parent, mesh)
    found = {name: gradients(folder, scenario, mesh) for name, scenario in scenarios().items()}
    learner, groups = a_learner(folder, mesh)
    reports = steps(learner, groups, 0, 2)
    middle = parameters_of(learner)
    # Written while the ranks train on, by threads that agree over a group of their own.
    writing = state.begin_save(learner, out / "checkpoint", dist.new_group(backend="gloo"))
    reports += steps(learner, groups, 2, 2)
    end = parameters_of(learner)
    writing.wait()
    dist.barrier()
    resumed, _ = a_learner(folder, mesh)
    state.load(resumed, out / "from_one_rank")
    foreign = parameters_of(resumed)
    state.load(resumed, out / "checkpoint")
    steps(resumed, groups, 2, 2)
    again = parameters_of(resumed)
    if rank == 0:
        torch.save(
            {
                "loaded": by_kind,
                "gradients": found,
                "reports": reports,
                "middle": middle,
                "end": end,
                "foreign": foreign,
                "again": again,
            },
            out / "found.pt",
        )
    dist.barrier()
    ranks.close()


def run(num_ranks: int, folder: Path, out: Path) -> dict[str, Any]:
    """Run all ranks; returns what rank 0 saved."""
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(rank, num_ranks, folder, out, ports)) for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    assert codes == [0] * num_ranks, f"exit codes of the ranks: {codes}"
    result: dict[str, Any] = torch.load(out / "found.pt")
    return result

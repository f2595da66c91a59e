"""What each of several learner ranks does in the tests of `test_ranks`: scenarios by name, results saved by rank 0."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from learner import checkpointing
from learner.learner import Learner
from learner.model import hugging_face
from learner.model.build import build_policy, materialise, shard
from learner.model.sharding import gathered
from learner.process_group import RankGroup
from learner.training_metrics import TrainingMetrics
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
    metrics = TrainingMetrics(sorted({group.source for group in groups}))
    update = learner._prepare(learner.inbox.take(order.updates[0], order.attempts), order, metrics)
    learner._accumulate(update, order, metrics)
    return {n: whole(p.grad) for n, p in policy.model.named_parameters() if p.grad is not None}


def with_reference(
    folder: Path,
    world: worlds.World,
    frozen: tuple[str, ...],
    mesh: Any = None,
    *,
    kl: str = "k3",
    token_budget: int = 60,
) -> Learner:
    """A learner whose policy equals the reference of its KL penalty."""
    config = worlds.config_with(
        model={"path": str(folder), "freeze": list(frozen)},
        loss={"kl": kl, "kl_weight": 0.1},
        optimizer={"token_budget": token_budget, "lr": 1e-2, "warmup": 0.0},
    )
    policies = [worlds.make_policy(folder, freeze=frozen) for _ in range(2)]
    if mesh is not None:
        for policy in policies:
            shard(policy, mesh, config.model, torch.device("cpu"))
    group = None if mesh is None else mesh.get_group()
    return Learner(config, policies[0], world, group=group, reference=policies[1].requires_grad_(False))


def kl_reports(mesh: Any, folder: Path, _out: Path) -> dict[str, list[dict[str, float]]]:
    """Every scenario trained for two versions against its reference, which the policy equals at the start."""
    found = {}
    for name, (world, groups, frozen) in scenarios().items():
        learner, reports = with_reference(folder, world, frozen, mesh), []
        for _ in range(2):
            learner.inbox.restore({"consumed": [], "open_from": 0})
            for group in groups:
                learner.deliver(group)
            reports.append(learner.train(runs.order_of(groups)).metrics)
        found[name] = reports
    return found


def whole(tensor: Any) -> torch.Tensor:
    return gathered(tensor).clone()


def steps(learner: Learner, groups: list[ScoredGroup], first: int, num: int) -> list[dict[str, float]]:
    """`num` versions of two updates each, on the same groups."""
    reports = []
    for version in range(first, first + num):
        learner.inbox.restore({"consumed": [], "open_from": 0})
        for group in groups:
            learner.deliver(group)
        progress = [(2 * version + done) / 100 for done in range(3)]
        order = TrainOrder(0, [[0, 1, 2], [3, 4, 5]], "off_policy", 0, 0, "none", progress)
        reports.append(learner.train(order).metrics)
    return reports


def a_learner(folder: Path, mesh: Any, **optimizer: Any) -> tuple[Learner, list[ScoredGroup]]:
    world, groups, frozen = scenarios()["frozen_tower"]
    # Two groups without variance: they run forward only, after the others' backward.
    for index in (1, 4):
        flat = [msgspec.structs.replace(verdict, reward=0.5) for verdict in groups[index].verdicts]
        groups[index] = msgspec.structs.replace(groups[index], verdicts=flat)
    config = worlds.config_with(
        model={"path": str(folder), "freeze": list(frozen)},
        optimizer={"token_budget": 60, "lr": 1e-2, "warmup": 0.0, **optimizer},
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
        policy = build_policy(section, torch.device("cpu"))
        model = policy.model
        assert all(parameter.is_meta for parameter in model.parameters())
        shard(policy, mesh, section, torch.device("cpu"))
        materialise(policy, section, torch.device("cpu"))
        values = {name: whole(p) for name, p in model.named_parameters(remove_duplicate=False)}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        total = sum(p.numel() for p in model.parameters())
        found[kind] = {"values": values | buffers, "read": num_read, "total": total, "blocked": policy.blocked_ids}
    hugging_face._rows_of = read
    return found


def parameters_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: whole(p) for name, p in learner.policy.model.named_parameters()}


def everything(mesh: Any, folder: Path, out: Path) -> dict[str, Any]:
    """Every scenario's gradients, two versions trained, a checkpoint, two more, and a resumed one."""
    by_kind = loaded(folder.parent, mesh)
    found = {name: gradients(folder, scenario, mesh) for name, scenario in scenarios().items()}
    learner, groups = a_learner(folder, mesh)
    reports = steps(learner, groups, 0, 2)
    middle = parameters_of(learner)
    # Written while the ranks train on, by threads that agree over a group of their own.
    writing = checkpointing.begin_save(learner, out / "checkpoint", dist.new_group(backend="gloo"))
    reports += steps(learner, groups, 2, 2)
    end = parameters_of(learner)
    writing.wait()
    dist.barrier()
    resumed, _ = a_learner(folder, mesh)
    checkpointing.load(resumed, out / "from_one_rank")
    foreign = parameters_of(resumed)
    checkpointing.load(resumed, out / "checkpoint")
    steps(resumed, groups, 2, 2)
    again = parameters_of(resumed)
    return {
        "loaded": by_kind, "gradients": found, "reports": reports, "middle": middle, "end": end, "foreign": foreign, "again": again,
    }  # fmt: skip


Program = Callable[[Any, Path, Path], dict[str, Any]]
"""(mesh, model folder, folder to write to) → what rank 0 found"""


def run_rank(program: Program, rank: int, num_ranks: int, folder: Path, out: Path, ports: Any) -> None:
    """The process of one rank."""
    torch.set_num_threads(1)
    ranks = RankGroup(rank, num_ranks)
    if rank == 0:
        port = ranks.open_store()
        for _ in range(num_ranks - 1):
            ports.put(port)
    else:
        port = ports.get()
    mesh = ranks.connect("127.0.0.1", port, torch.device("cpu"))
    found = program(mesh, folder, out)
    if rank == 0:
        torch.save(found, out / "found.pt")
    dist.barrier()
    ranks.close()


def run(program: Program, num_ranks: int, folder: Path, out: Path, deadline_s: float = 240.0) -> dict[str, Any]:
    """Run all ranks; returns what rank 0 found. Ranks that have not ended by the deadline are killed, and the test fails."""
    context = multiprocessing.get_context("spawn")
    ports = context.Queue()
    processes = [
        context.Process(target=run_rank, args=(program, rank, num_ranks, folder, out, ports))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + deadline_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    assert codes == [0] * num_ranks, f"exit codes of the ranks: {codes}"
    result: dict[str, Any] = torch.load(out / "found.pt")
    return result

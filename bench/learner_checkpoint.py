"""How long training stands still for a checkpoint: written at once, against copied and written while training goes on.

Called by `bench.learner checkpoint`. Random weights, 512 wide, 8 layers, with Adam's moments; both ways in turn.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.learner_steps import OurStep, workload
from learner import checkpointing
from vtriune.record.checkpoint import commit, stage

TEXT = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 16384,
}  # fmt: skip


def compare(rounds: int, write_random: Callable[[Path, dict[str, int], int], None]) -> dict[str, Any]:
    """Seconds that training stands still, median over `rounds`, and how much longer updates take beside a write."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_random(model, TEXT, 8)
        step = OurStep(model, torch.device("cpu"), token_budget=4096)
        work = workload(step.policy.model, num_groups=2, group_size=4, text=(20, 30), response=(20, 30), grid=(8, 8))
        alone = [step(work)["seconds"] for _ in range(rounds + 1)][1:]
        at_once: list[float] = []
        blocked: list[float] = []
        written: list[float] = []
        beside: list[float] = []
        for number in range(rounds):
            at_once.append(_at_once(step, Path(folder), 2 * number))
            times = _beside_training(step, work, Path(folder), 2 * number + 1)
            blocked.append(times[0])
            written.append(times[1])
            beside += times[2]
        num_bytes = sum(p.stat().st_size for p in (Path(folder) / "step-1").rglob("*") if p.is_file())
    found = {name: statistics.median(values) for name, values in (
        ("at_once_s", at_once), ("blocked_s", blocked), ("written_s", written), ("update_alone_s", alone), ("update_beside_s", beside),
    )}  # fmt: skip
    print(f"\ncheckpoint of {num_bytes / 2**20:.0f} MiB, training stands still")
    print(f"  written at once          {found['at_once_s']:6.2f} s")
    shorter = found["at_once_s"] / found["blocked_s"]
    print(
        f"  copied, written beside   {found['blocked_s']:6.2f} s, {shorter:.1f} × shorter; on disk after {found['written_s']:.2f} s"
    )
    print(f"  an update takes {found['update_alone_s']:.2f} s alone, {found['update_beside_s']:.2f} s beside a write")
    return {**found, "num_bytes": num_bytes}


def _at_once(step: OurStep, folder: Path, number: int) -> float:
    started = time.perf_counter()
    staging = stage(folder, number)
    checkpointing.begin_save(step.learner, staging).wait()
    commit(staging)
    return time.perf_counter() - started


def _beside_training(step: OurStep, work: Any, folder: Path, number: int) -> tuple[float, float, list[float]]:
    """Until training may go on, until the files are written, and the updates done meanwhile."""
    started = time.perf_counter()
    staging = stage(folder, number)
    writing = checkpointing.begin_save(step.learner, staging)
    blocked = time.perf_counter() - started
    updates = [step(work)["seconds"]]
    while not all(part.done() for part in writing.parts):
        updates.append(step(work)["seconds"])
    writing.wait()
    written = time.perf_counter() - started
    commit(staging)
    return blocked, written, updates

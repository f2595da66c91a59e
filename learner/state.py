"""The learner's part of a checkpoint: everything that the next update depends on. Called by `learner.service` on all ranks.

    dcp/           parameters and Adam's state, sharded (torch.distributed.checkpoint); the number of ranks may change
    hf/            a ready Hugging Face folder: weights in `model.dtype`, processor, generation_config
    learner.json   ids of the consumed groups

`begin_save` copies the state to host memory and returns; threads write it while training goes on. The folder's atomicity (fsync,
hashes, rename) is its owner's affair: `vtriune.checkpoint`, once the threads of all ranks have ended.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from learner import hugging_face
from learner.learner import Learner


class Writing:
    """A checkpoint on its way to the disk, written by threads of this rank."""

    def __init__(self, folder: Path, parts: Sequence[Future[Any]]):
        self.folder = folder
        self._parts = parts

    @property
    def is_done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        return all(part.done() for part in self._parts)

    def wait(self) -> int:
        """Return once this rank's files are written: bytes below the folder so far. Raises what broke a write, however often asked."""
        for part in self._parts:
            part.result()
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def begin_save(learner: Learner, folder: Path, group: dist.ProcessGroup | None = None) -> Writing:
    """Copy the state as it is now and start writing it below `folder`. Collective; the learner may train on once it returns.

    `group` is for the ranks' agreement while they write, beside the learner's own, which is in use meanwhile; None without one.
    Memory until written, on the host: the rank's shards (parameters and Adam's moments); on rank 0 also the model in `model.dtype`.
    """
    sharded: Any = dcp.async_save(
        _sharded(learner), checkpoint_id=folder / "dcp", process_group=group, no_dist=group is None
    )
    section = learner.config.model
    weights = hugging_face.snapshot(learner.policy.model, Path(section.path), section.dtype, keeps=learner.rank == 0)
    groups = learner.inbox.state()
    if learner.rank:
        return Writing(folder, [sharded])
    with_threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    whole = with_threads.submit(_write_whole, weights, groups, folder)
    with_threads.shutdown(wait=False)
    return Writing(folder, [sharded, whole])


def save(learner: Learner, folder: Path) -> int:
    """`begin_save`, and wait for all ranks; returns the bytes below `folder`. Collective."""
    num_bytes = begin_save(learner, folder, learner.group).wait()
    if learner.group is not None:
        dist.barrier(learner.group)
    return num_bytes


def load(learner: Learner, folder: Path) -> None:
    """Bring `learner` to the saved state, whatever the number of ranks that saved it. Collective."""
    state = _sharded(learner)
    saved = dcp.FileSystemReader(folder / "dcp").read_metadata().state_dict_metadata
    state["rng"] = {name: value for name, value in state["rng"].items() if f"rng.{name}" in saved}
    dcp.load(state, checkpoint_id=folder / "dcp", process_group=learner.group, no_dist=learner.group is None)
    model = learner.policy.model
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=True))
    set_optimizer_state_dict(model, learner.optimizer.adamw, optim_state_dict=state["optimizer"])
    for value in state["rng"].values():
        torch.set_rng_state(value)
    learner.inbox.restore(json.loads((folder / "learner.json").read_text()))
    learner.prompts.forget_features()


def _write_whole(weights: hugging_face.Snapshot, groups: dict[str, Any], folder: Path) -> None:
    """What rank 0 writes besides its shards."""
    hugging_face.write_folder(weights, folder / "hf")
    (folder / "learner.json").write_text(json.dumps(groups))


def _sharded(learner: Learner) -> dict[str, Any]:
    """What DCP writes and reads in place."""
    model = learner.policy.model
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, learner.optimizer.adamw),
        "rng": {str(learner.rank): torch.get_rng_state()},
    }

"""The learner's part of a checkpoint: everything that the next update depends on. Called by `learner.rank` on all ranks.

    dcp/           parameters and Adam's state, sharded (torch.distributed.checkpoint); the number of ranks may change
    hf/            a ready Hugging Face folder: weights in `model.dtype`, processor, generation_config
    learner.json   ids of the consumed groups

`begin_save` copies the state to host memory and returns; threads write it while training goes on. `vtriune.record.checkpoint` makes the
folder whole (fsync, hashes, rename), once the threads of all ranks have ended.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from learner.learner import Learner
from learner.model import hugging_face
from vtriune.runtime import report_step


@dataclass(frozen=True, slots=True)
class Writing:
    """A checkpoint on its way to the disk, written by threads of this rank."""

    parts: Sequence[Future[Any]]

    def wait(self) -> None:
        """Return once this rank's files are written. Raises what broke a write, however often asked."""
        with _told_plainly():
            for part in self.parts:
                part.result()


def begin_save(learner: Learner, folder: Path, group: dist.ProcessGroup | None = None) -> Writing:
    """Copy the state as it is now and start writing it below `folder`. Collective; the learner may train on once it returns.

    `group` is for the ranks' agreement while they write, beside the learner's own, which is in use meanwhile; None without one.
    Memory until written, on the host: the rank's shards (parameters and Adam's moments); on rank 0 also the model in `model.dtype`.
    """
    sharded = state_dict_saver.async_save(
        _sharded(learner),
        checkpoint_id=folder / "dcp",
        planner=_ToldSave(),
        process_group=group,
        no_dist=group is None,
    )
    # It answers otherwise only when it is given a stager.
    assert isinstance(sharded, Future)
    section = learner.config.model
    weights = hugging_face.snapshot(learner.policy.model, Path(section.path), section.dtype, keeps=learner.rank == 0)
    groups = learner.inbox.state()
    if learner.rank:
        return Writing([sharded])
    with_threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    whole = with_threads.submit(_write_whole, weights, groups, folder)
    with_threads.shutdown(wait=False)
    return Writing([sharded, whole])


def load(learner: Learner, folder: Path) -> None:
    """Bring `learner` to the saved state, whatever the number of ranks that saved it. Collective."""
    state = _sharded(learner)
    saved = FileSystemReader(folder / "dcp").read_metadata().state_dict_metadata
    state["rng"] = {name: value for name, value in state["rng"].items() if f"rng.{name}" in saved}
    with _told_plainly():
        state_dict_loader.load(
            state,
            checkpoint_id=folder / "dcp",
            planner=_ToldLoad(),
            process_group=learner.group,
            no_dist=learner.group is None,
        )
    model, adamw = learner.policy.model, learner.optimizer.adamw
    set_model_state_dict(model, state["model"], options=StateDictOptions(strict=True))
    # Moments are the checkpoint's; weight decay, betas and whatever else a group is told are this configuration's.
    told = [{name: value for name, value in group.items() if name != "params"} for group in adamw.param_groups]
    set_optimizer_state_dict(model, adamw, optim_state_dict=state["optimizer"])
    for group, own in zip(adamw.param_groups, told, strict=True):
        group.update(own)
    for value in state["rng"].values():
        torch.set_rng_state(value)
    learner.inbox.restore(json.loads((folder / "learner.json").read_bytes()))
    learner.prompts.forget_features()


class SavedTensors(Mapping[str, torch.Tensor]):
    """Parameters and Adam's moments of a checkpoint by name, parameters first; each is read, whole, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "dcp"
        stored = FileSystemReader(self._folder).read_metadata().state_dict_metadata
        self._stored = {
            name: item
            for part in ("model.", "optimizer.")
            for name, item in sorted(stored.items())
            if name.startswith(part) and isinstance(item, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._stored[name]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        with warnings.catch_warnings():
            # Of a load outside of a process group, which is what `no_dist` asks for.
            warnings.simplefilter("ignore", UserWarning)
            state_dict_loader.load({name: tensor}, checkpoint_id=self._folder, no_dist=True)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _ToldSave(DefaultSavePlanner):
    """Tells of each tensor as it is written."""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | BytesIO:
        report_step("checkpoint", f"writes {write_item.index.fqn}")
        return super().resolve_data(write_item)


class _ToldLoad(DefaultLoadPlanner):
    """Tells of each tensor as it is read."""

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        report_step("checkpoint", f"has read {read_item.dest_index.fqn}")
        super().commit_tensor(read_item, tensor)


@contextlib.contextmanager
def _told_plainly() -> Iterator[None]:
    """The error of the first rank that had one, in place of torch's CheckpointException: that is no Exception and would pass by whoever
    handles those, and its text is tracebacks."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = error.failures[min(error.failures)]
        raise cause from error


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

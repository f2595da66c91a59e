"""The learner's part of a checkpoint: everything that the next update depends on. Called by `learner.service` on all ranks.

    dcp/           parameters and Adam's state, sharded (torch.distributed.checkpoint); the number of ranks may change
    hf/            a ready Hugging Face folder: weights in `model.dtype`, processor, generation_config
    learner.json   ids of the consumed groups

The folder's atomicity (fsync, hashes, rename) is its owner's affair: `vtriune.checkpoint`.
"""

import json
import shutil
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

from learner.learner import Learner

_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save(learner: Learner, folder: Path) -> int:
    """Write below `folder`, collectively; returns the number of bytes this rank's folder view holds afterwards."""
    dcp.save(
        _sharded(learner), checkpoint_id=folder / "dcp", process_group=learner.group, no_dist=learner.group is None
    )
    save_hugging_face(learner, folder / "hf")
    if learner.rank == 0:
        (folder / "learner.json").write_text(json.dumps({"consumed": learner.inbox.consumed()}))
    if learner.group is not None:
        dist.barrier(learner.group)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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
    learner.inbox.restore(json.loads((folder / "learner.json").read_text())["consumed"])
    learner.prompts.forget_features()


def save_hugging_face(learner: Learner, folder: Path) -> None:
    """Gather the full weights to rank 0 and write a folder that transformers and vLLM load as it is. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full: dict[str, Any] = get_model_state_dict(learner.policy.model, options=options)
    if learner.rank:
        return
    dtype = _DTYPES[learner.config.model.dtype]
    full = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in full.items()}
    model: Any = learner.policy.model
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=full)
    _declare_dtype(folder / "config.json", learner.config.model.dtype)
    for path in Path(learner.config.model.path).iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def _declare_dtype(path: Path, dtype: str) -> None:
    """The weights' type as written, which is not that of the float32 module they come from."""
    settings = json.loads(path.read_text())
    for section in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if "dtype" in section:
            section["dtype"] = dtype
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _sharded(learner: Learner) -> dict[str, Any]:
    """What DCP writes and reads in place."""
    model = learner.policy.model
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, learner.optimizer.adamw),
        "rng": {str(learner.rank): torch.get_rng_state()},
    }

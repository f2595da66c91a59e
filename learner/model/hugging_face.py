"""A model folder in Hugging Face format: read into the shards of this rank, and written again with other values.

    read_weights   each rank reads from the safetensors files only the rows that its shards hold
    snapshot       the whole weights in the host memory of rank 0; training may go on while they are written
    write_folder   the source folder again (files, tensor names, processor, generation_config), with the snapshot's values

The names in a file need not be the model's: transformers' own renaming rules translate. Called by `learner.model.build`
and `learner.checkpointing`.
"""

import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from learner.model.sharding import gathered, local
from vtriune.runtime import report_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


class WeightsError(ValueError):
    """A model folder whose weights do not fit its own configuration: names the folder and the tensors."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a folder."""

    file: str
    key: str
    """Its name in the file."""
    name: str
    """Its name in the model's `state_dict()`."""


def stored_tensors(model: "PreTrainedModel", folder: Path) -> list[Stored]:
    """The tensors of `folder` that belong to `model`, file by file. Reads headers only.

    Others are named in a warning, but for those that transformers' model class lists as harmless. Raises WeightsError.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = model.state_dict(keep_vars=True)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def name_of(key: str) -> str:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if converter is not None:
            raise WeightsError(f"{folder}: {key} is stored in another layout than the model's; save the model anew")
        if name not in known and key in known:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, known)
        return str(name)

    found: list[Stored] = []
    foreign: list[Stored] = []
    for file in _weight_files(folder):
        with safe_open(folder / file, framework="pt") as reader:
            for key in sorted(reader.keys()):
                item = Stored(file, key, name_of(key))
                (found if item.name in known else foreign).append(item)
    harmless = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    unused = [item.key for item in foreign if not any(re.search(pattern, item.name) for pattern in harmless)]
    if unused:
        log.warning("%s holds %d tensors that the model does not use: %s", folder, len(unused), ", ".join(unused[:8]))
    return found


def read_weights(model: "PreTrainedModel", folder: Path) -> None:
    """Fill `model`, sharded or not, from the files of `folder`; a tied tensor is read under any of its names.

    Raises WeightsError for tensors that are missing, of another shape, or tied by the configuration and different in the file.
    """
    state = model.state_dict(keep_vars=True)
    filled: dict[int, str] = {}
    for file, items in groupby(stored_tensors(model, folder), attrgetter("file")):
        with safe_open(folder / file, framework="pt") as reader:
            for item in items:
                report_step("weights", f"reads {item.key} of {folder / file}")
                tensor = state[item.name]
                values = _rows_of(reader, item, tensor, folder)
                part = local(tensor)
                if id(tensor) not in filled:
                    part.copy_(values)
                    filled[id(tensor)] = item.key
                elif not torch.equal(part, values.to(part)):
                    raise WeightsError(
                        f"{folder}: {item.key} and {filled[id(tensor)]} are tied by the configuration, but differ in "
                        "the file; set tie_word_embeddings to false in config.json"
                    )
    missing = [name for name, tensor in state.items() if id(tensor) not in filled]
    if missing:
        raise WeightsError(f"{folder}: {len(missing)} tensors of the model are in no file: {', '.join(missing[:8])}")


def compute_buffers(model: nn.Module) -> None:
    """Fill the buffers that no file holds (rotary frequencies) by the rule of the submodel that owns them, as
    transformers' `from_pretrained` does."""
    from transformers import PreTrainedModel

    owners = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    with torch.no_grad():
        for name, module in model.named_modules():
            if module._non_persistent_buffers_set:
                prefixes = [owner for owner in owners if not owner or name == owner or name.startswith(owner + ".")]
                fill: Callable[[nn.Module], None] = owners[max(prefixes, key=len)]._init_weights
                fill(module)


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Weights as they were at one moment; only rank 0 holds them."""

    source: Path
    """The folder that the model was loaded from."""
    stored: Sequence[Stored]
    tensors: Mapping[str, Tensor]
    """By name in `state_dict()`; on the CPU, memory of their own, shared between tied names."""
    dtype: str


def snapshot(model: "PreTrainedModel", source: Path, dtype: str, *, keeps: bool) -> Snapshot:
    """Gather the whole weights, tensor by tensor; collective. `keeps`: this rank is to write them.

    Memory on that rank: the model once, in `dtype`, on the host. Raises WeightsError when `source` has changed.
    """
    state = model.state_dict(keep_vars=True)
    copies: dict[int, Tensor] = {}
    # Every rank gathers the same tensors, a tied one once, whether it keeps them or not.
    for number, (key, tensor) in enumerate({id(tensor): tensor for tensor in state.values()}.items(), 1):
        report_step("checkpoint", f"copies tensor {number} of at most {len(state)}")
        whole = gathered(tensor)
        if keeps:
            target = getattr(torch, dtype) if whole.is_floating_point() else whole.dtype
            copies[key] = torch.empty(whole.shape, dtype=target).copy_(whole)
    tensors = {name: copies[id(tensor)] for name, tensor in state.items()} if keeps else {}
    return Snapshot(source, stored_tensors(model, source) if keeps else (), tensors, dtype)


def write_folder(weights: Snapshot, folder: Path) -> None:
    """Write `weights` in the layout of their source folder, beside copies of its other files."""
    folder.mkdir(parents=True, exist_ok=True)
    by_file: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for item in weights.stored:
        tensor, file = weights.tensors[item.name], by_file[item.file]
        # A file of a tied model may hold both names; safetensors refuses two names of one memory.
        is_alias = any(other is tensor for other in file.values())
        file[item.key] = tensor.clone() if is_alias else tensor
    for name, tensors in by_file.items():
        report_step("checkpoint", f"writes {folder / name}")
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if list(by_file) != [_SINGLE]:
        sizes = [weights.tensors[item.name].nbytes for item in weights.stored]
        weight_map = {item.key: item.file for item in weights.stored}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in sorted(weights.source.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    _declare_dtype(folder / "config.json", weights.dtype)


def _weight_files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if index.is_file():
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if not (folder / _SINGLE).is_file():
        raise WeightsError(f"{folder}: neither {_INDEX} nor {_SINGLE}; save the model in safetensors format")
    return [_SINGLE]


def _rows_of(reader: Any, item: Stored, tensor: Tensor, folder: Path) -> Tensor:
    """This rank's part of a stored tensor, in the type it is stored in. `reader` is safetensors' open file, which declares no types."""
    stored = reader.get_slice(item.key)
    shape = tuple(stored.get_shape())
    if shape != tuple(tensor.shape):
        raise WeightsError(
            f"{folder / item.file}: {item.key} has shape {list(shape)}, the model's {item.name} {list(tensor.shape)}; "
            "weights and config.json are not of one model"
        )
    part: Tensor
    if not isinstance(tensor, DTensor):
        part = reader.get_tensor(item.key)
        return part
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in sizes:
        # More ranks than rows.
        return torch.empty(sizes)
    part = stored[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]
    return part


def _declare_dtype(path: Path, dtype: str) -> None:
    """The weights' type as written, for the model and its parts; loaders look in either place."""
    settings = json.loads(path.read_bytes())
    for section in (settings, *(settings[name] for name in ("text_config", "vision_config") if name in settings)):
        section.pop("torch_dtype", None)
        section["dtype"] = dtype
    path.write_text(json.dumps(settings, indent=2) + "\n")

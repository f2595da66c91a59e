"""From a Hugging Face folder to a sharded `Policy` with the right modules frozen. Called by `learner.service`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from learner import attention
from learner.families import MODULES, Family, check_modules, family_of
from learner.hugging_face import compute_buffers, read_weights
from learner.norms import use_lean_norms
from learner.policy import Policy
from vtriune.config.tree import Model
from vtriune.torchvision_schemas import define_missing_schemas


class ModelError(ValueError):
    """A model folder or a model setting that cannot be trained; says which and what to change."""


def build_model(section: Model, device: torch.device) -> tuple[nn.Module, Family]:
    """transformers' model of `section.path` without values (on torch's `meta` device), with our attention for `device` and the
    frozen modules frozen. `materialise` gives it values, after `shard` where it is sharded.

    Weights are float32 whatever `dtype` says: bfloat16 is the type of computation and of what is published.
    """
    define_missing_schemas()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    settings: Any = AutoConfig.from_pretrained(section.path, local_files_only=True)
    family = family_of(settings.model_type)
    _refuse_sliding_window(settings, section.path)
    auto = AutoModelForCausalLM if family.visual is None else AutoModelForImageTextToText
    with torch.device("meta"):
        model: Any = auto.from_config(settings, dtype=torch.float32)
    use_attention(model, family, kernel_of(section.attention, device))
    if device.type == "cpu" and not section.compile:
        use_lean_norms(family.decoder(model))
    freeze(model, family, section.freeze)
    # Nothing here is random (Qwen's dropout rates are 0); training mode is what switches activation checkpointing on.
    model.train()
    if section.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if section.compile:
        # In place: parameter names and FSDP's hooks stay. Packs differ in length, hence dynamic shapes.
        for block in family.decoder(model).layers:  # type: ignore[union-attr]
            block.compile(dynamic=True)
    return model, family


def materialise(root: nn.Module, model: Any, section: Model, device: torch.device) -> None:
    """Give `model` memory on `device` and the values of its folder; each rank reads its own shards only.

    `root` is what `shard` sharded, or `model` itself. Buffers of `root` that have values keep them. Raises WeightsError.
    """
    home = torch.device("cpu") if _offloads_all(section, device) else device
    kept = {name: buffer for name, buffer in root.named_buffers() if not buffer.is_meta}
    root.to_empty(device=home)
    # An unsharded model's tied parameters are two after this; a sharded one's stay one.
    model.tie_weights()
    for name, buffer in root.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])
    compute_buffers(model)
    for module in root.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Offloaded parameters live on the host, buffers where the work is done.
            setattr(module, name, buffer.to(device))
    read_weights(model, Path(section.path))


def load_model(section: Model, device: torch.device) -> tuple[nn.Module, Family]:
    """`build_model` and `materialise` in one: an unsharded model with its values."""
    model, family = build_model(section, device)
    materialise(model, model, section, device)
    return model, family


def kernel_of(choice: str, device: torch.device) -> str:
    """The attention function's name in transformers' table for `model.attention`."""
    if choice == "auto":
        choice = "flex" if device.type == "cuda" else "cpu"
    # `padded` runs the packed kernels too, on packs that repeat the prompt for every completion.
    return attention.FLEX if choice == "flex" or (choice == "padded" and device.type == "cuda") else attention.CPU


def use_attention(model: nn.Module, family: Family, kernel: str) -> None:
    """Let the decoder's blocks call `kernel`; the vision tower keeps transformers' choice."""
    attention.register()
    decoder: Any = family.decoder(model)
    decoder.config._attn_implementation = kernel


def freeze(model: nn.Module, family: Family, frozen: list[Any]) -> None:
    """Switch gradients off in the named modules; raises ModelError when nothing would be trained."""
    check_modules(frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.module_of(name) not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(
            f"model.freeze: {list(frozen)} leaves nothing to train; modules of this model: {_present(model, family)}"
        )


def shard(policy: Policy, mesh: DeviceMesh, section: Model, device: torch.device) -> None:
    """`fully_shard` every block, then the rest as the root unit (embedding, output layer, norms, connector)."""
    mixed = MixedPrecisionPolicy()
    if section.dtype == "bfloat16":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if _offloads_all(section, device) else OffloadPolicy()
    for block in policy.family.blocks(policy.model):
        fully_shard(block, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    fully_shard(policy, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    if policy.family.visual is not None:
        register_fsdp_forward_method(policy, "encode")


def _offloads_all(section: Model, device: torch.device) -> bool:
    return section.offload == "all" and device.type == "cuda"


def num_parameters(model: nn.Module, family: Family) -> dict[str, int]:
    """Number of parameters per module, all shards together; tied ones once."""
    counts = dict.fromkeys(MODULES, 0)
    for name, parameter in model.named_parameters():
        counts[family.module_of(name)] += parameter.numel()
    return counts


def _present(model: nn.Module, family: Family) -> list[str]:
    return [module for module, count in num_parameters(model, family).items() if count]


def _refuse_sliding_window(settings: Any, path: str | Path) -> None:
    text = settings.get_text_config()
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ModelError(
            f"{path}: the model uses sliding-window attention, which packs do not implement; set use_sliding_window to false"
        )

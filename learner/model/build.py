"""From a Hugging Face folder to a sharded `Policy` with the right modules frozen. Called by `learner.rank`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

from learner.model import attention
from learner.model.families import Family, family_of
from learner.model.hugging_face import compute_buffers, read_weights
from learner.model.norms import use_lean_norms
from learner.model.policy import Policy
from vtriune.config.tree import Model
from vtriune.torchvision_schemas import define_missing_schemas

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelError(ValueError):
    """A model folder or a model setting that cannot be trained; says which and what to change."""


def build_policy(section: Model, device: torch.device, *, temperature: float = 1.0) -> Policy:
    """transformers' model of `section.path` without values (on torch's `meta` device), with our attention for `device`, the
    frozen modules frozen and image and video pads blocked. `materialise` gives it values, after `shard` where it is sharded.

    Weights are float32 whatever `dtype` says: bfloat16 is the type of computation and of what is published.
    """
    define_missing_schemas()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    # `Any` here and below: transformers' configuration classes differ by family.
    settings: Any = AutoConfig.from_pretrained(section.path, local_files_only=True)
    family = family_of(settings.model_type)
    if "sliding_attention" in (getattr(settings.get_text_config(), "layer_types", None) or ()):
        raise ModelError(
            f"{section.path}: the model uses sliding-window attention, which packs do not implement; set use_sliding_window to false"
        )
    auto = AutoModelForCausalLM if family.visual is None else AutoModelForImageTextToText
    with torch.device("meta"):
        from_config: Callable[..., PreTrainedModel] = auto.from_config
        model = from_config(settings, dtype=torch.float32)
    # The decoder's blocks only; the vision tower keeps transformers' choice.
    attention.register()
    family.decoder(model).config._attn_implementation = kernel_of(section.attention, device)
    if device.type == "cpu" and not section.compile:
        use_lean_norms(family.decoder(model))
    freeze(model, family, section.freeze)
    # Nothing here is random (Qwen's dropout rates are 0); training mode is what switches activation checkpointing on.
    model.train()
    if section.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if section.compile:
        # In place: parameter names and FSDP's hooks stay. Packs differ in length, hence dynamic shapes.
        for block in family.decoder(model).layers:
            block.compile(dynamic=True)
    pads = [getattr(settings, key, None) for key in ("image_token_id", "video_token_id")]
    blocked = [token for token in pads if token is not None]
    return Policy(model, family, temperature=temperature, blocked_ids=blocked)


def materialise(policy: Policy, section: Model, device: torch.device) -> None:
    """Give `policy`, sharded or not, memory on `device` and the values of its folder; each rank reads its own shards only.

    Buffers that have values keep them. Raises WeightsError.
    """
    home = torch.device("cpu") if _offloads_all(section, device) else device
    kept = {name: buffer for name, buffer in policy.named_buffers() if not buffer.is_meta}
    policy.to_empty(device=home)
    # An unsharded model's tied parameters are two after this; a sharded one's stay one.
    policy.model.tie_weights()
    for name, buffer in policy.named_buffers():
        if name in kept:
            buffer.copy_(kept[name])
    compute_buffers(policy.model)
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # Offloaded parameters live on the host, buffers where the work is done.
            setattr(module, name, buffer.to(device))
    read_weights(policy.model, Path(section.path))


def kernel_of(choice: str, device: torch.device) -> str:
    """The attention function's name in transformers' table for `model.attention`."""
    if choice == "auto":
        choice = "flex" if device.type == "cuda" else "cpu"
    # `padded` runs the packed kernels too, on packs that repeat the prompt for every completion.
    return attention.FLEX if choice == "flex" or (choice == "padded" and device.type == "cuda") else attention.CPU


def freeze(model: nn.Module, family: Family, frozen: Sequence[str]) -> None:
    """Switch gradients off in the named modules; raises ModelError when nothing would be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(family.module_of(name) not in frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        present = sorted({family.module_of(name) for name, _ in model.named_parameters()})
        raise ModelError(f"model.freeze: {list(frozen)} leaves nothing to train; modules of this model: {present}")


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

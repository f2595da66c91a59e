"""The independent side: transformers' own forward on one trajectory at a time, and the loss of the paper in plain autograd."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.learner.worlds import IMAGE, VIDEO, World
from vtriune.messages import ScoredGroup


def load(folder: Any, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with its own attention."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoConfig.from_pretrained(folder).model_type
    auto = AutoModelForCausalLM if kind == "qwen3" else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def logprobs_of(
    model: Any, world: World, scored: ScoredGroup, completion: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) (T,) of one completion from full logits, image and video pads masked."""
    group = scored.group
    features = world.features[group.lease.sample.row]
    response = group.trajectories[completion].token_ids
    ids = torch.from_numpy(np.concatenate([group.prompt_ids, response]).astype(np.int64))[None]
    inputs: dict[str, Any] = {"input_ids": ids}
    has_images = len(features.image_grid_thw) > 0
    if has_images:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        inputs["pixel_values"] = torch.from_numpy(features.pixel_values).to(model.dtype)
        inputs["image_grid_thw"] = torch.from_numpy(features.image_grid_thw)
    if hasattr(model, "model") and hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    logits = model(**inputs, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1] / temperature
    if model.config.model_type != "qwen3":
        logits = logits.index_fill(-1, torch.tensor([IMAGE, VIDEO]), float("-inf"))
    logs = torch.log_softmax(logits, -1)
    entropy = torch.special.entr(logs.exp()).sum(-1)
    return logs.gather(-1, torch.from_numpy(response.astype(np.int64))[:, None])[:, 0], entropy

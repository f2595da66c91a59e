"""The trained model as one module: a pack in, log-probs and entropy of its response tokens out. FSDP2's root unit.

The decoder's blocks stay transformers' own and run through their `__call__`, so sharding, checkpointing and compilation hooks
apply; only the attention function is ours (`learner.model.attention`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from learner.model.attention import Blocks
from learner.model.families import Family
from learner.model.logprobs import score_tokens
from learner.model.packing import Pack


@dataclass(frozen=True, slots=True, eq=False)
class PackInputs:
    """A pack's tensors on the model's device."""

    token_ids: Tensor
    """int64 (N,)"""
    positions: Tensor
    """int64 (3, 1, N), or (1, N) for plain rotary positions"""
    source_rows: Tensor
    target_ids: Tensor
    """int64 (R,) each"""
    image_rows: Tensor
    """int64: rows of image tokens, in order"""
    blocks: Blocks


@dataclass(frozen=True, slots=True)
class Layout:
    """What turns token ids into the model's inputs."""

    image_token_id: int | None
    num_position_axes: int
    device: torch.device

    def inputs(self, pack: Pack) -> PackInputs:
        """Move a pack to the device."""
        positions = pack.positions[:, None] if self.num_position_axes == 3 else pack.positions[:1]
        return PackInputs(
            token_ids=self.tensor(pack.token_ids),
            positions=self.tensor(positions),
            source_rows=self.tensor(pack.source_rows),
            target_ids=self.tensor(pack.target_ids),
            # None equals no id.
            image_rows=self.tensor(np.flatnonzero(pack.token_ids == self.image_token_id)),
            blocks=Blocks(pack, self.device),
        )

    def tensor(self, array: np.ndarray) -> Tensor:
        """`array` on the device."""
        return torch.from_numpy(array).to(self.device)


Pixels = tuple[Tensor, Tensor]
"""Patches float32 (patches, patch_dim) of some images, and their grids int64 (images, 3)."""
Vision = tuple[Tensor | None, Pixels | None]
"""`features` and `pixels` of `Policy.forward`: one of them, or neither where there is no image."""


class Policy(nn.Module):
    """`model` is transformers' module; its own `state_dict()` names are the published ones."""

    blocked_ids: Tensor
    """int64: ids that are never sampled"""

    def __init__(self, model: nn.Module, family: Family, *, temperature: float, blocked_ids: list[int]):
        super().__init__()
        # transformers' class, another one in each family, hence `Any`.
        self.model: Any = model
        self.family = family
        self.temperature = temperature
        self.register_buffer("blocked_ids", torch.tensor(blocked_ids, dtype=torch.int64), persistent=False)

    if TYPE_CHECKING:
        # nn.Module's own, which runs the hooks around `forward`, declares no types.
        def __call__(
            self, inputs: PackInputs, features: Tensor | None = None, pixels: Pixels | None = None
        ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, inputs: PackInputs, features: Tensor | None = None, pixels: Pixels | None = None
    ) -> tuple[Tensor, Tensor]:
        """log-probs and entropies, float32 (R,) each.

        `features` (I, D·(1 + deepstack levels)) holds one row per image token of the pack, in order, when they were computed ahead.
        `pixels` (values, grids) sends the pack's images through the tower with gradients instead. A pack without image
        tokens may come with pixels all the same: they weigh 0, and this rank takes part in the tower's collectives.
        """
        decoder = self.family.decoder(self.model)
        embeds = decoder.get_input_embeddings()(inputs.token_ids)
        if pixels is not None:
            features = torch.cat(self.encode(*pixels))
        extra: dict[str, Any] = {}
        if features is not None and not len(inputs.image_rows):
            embeds = embeds + 0 * features.sum().to(embeds.dtype)
        elif features is not None:
            embeds, extra = self._with_images(embeds, features.to(embeds.dtype), inputs.image_rows)
        hidden = decoder(
            inputs_embeds=embeds[None],
            position_ids=inputs.positions,
            # transformers makes no (N, N) mask for an attention function outside its own table: the structure is in `blocks`.
            attention_mask=None,
            use_cache=False,
            blocks=inputs.blocks.prepared(decoder.config._attn_implementation),
            **extra,
        ).last_hidden_state[0]
        return score_tokens(
            hidden.index_select(0, inputs.source_rows),
            self.model.get_output_embeddings().weight,
            inputs.target_ids,
            temperature=self.temperature,
            blocked_ids=self.blocked_ids,
        )

    def _with_images(self, embeds: Tensor, features: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings with image tokens replaced, and what deepstack adds to the decoder's arguments."""
        width = embeds.shape[-1]
        embeds = embeds.index_copy(0, rows, features[:, :width])
        if not self.family.has_deepstack:
            return embeds, {}
        is_image = torch.zeros(1, len(embeds), dtype=torch.bool, device=embeds.device)
        is_image[0, rows] = True
        return embeds, {
            "visual_pos_masks": is_image,
            "deepstack_visual_embeds": list(torch.split(features[:, width:], width, dim=1)),
        }

    def encode(self, pixel_values: Tensor, image_grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Features of each image, (merged tokens, D·(1 + deepstack levels)), through the vision tower."""
        output = self.model.get_image_features(pixel_values, image_grid_thw)
        images: tuple[Tensor, ...] = output.pooler_output
        if not self.family.has_deepstack:
            return images
        levels: list[tuple[Tensor, ...]] = output.deepstack_features
        return tuple(torch.cat([image, *(level[i] for level in levels)], dim=1) for i, image in enumerate(images))

"""Warm start of the vision tower: it learns to name the content of a cell. Called by the warm start.

The tower's attention windows are one cell, so cells are encoded alone: `encode_cells` equals the tower's own forward on whole
images, in one batch. After this phase the tower stays frozen and the features of every cell the train split can show are a table.
"""

import logging
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)

from examples.digits.rendering import BAR, BLANK, CELL_PX, NUM_VARIANTS, CellInk, DigitPool, draw_cell

NUM_CLASSES = 12  # ten digits, blank, bar
FEATURE_RMS = 0.5
log = logging.getLogger(__name__)


def encode_cells(visual: Qwen2_5_VisionTransformerPretrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Features (n, out_hidden_size) of grey cells (n, 28, 28), normalised to [-1, 1] as the image processor does."""
    num_cells, half = pixels.shape[0], CELL_PX // 2
    patches = pixels.view(num_cells, 2, half, 2, half).transpose(2, 3).reshape(num_cells * 4, half * half)
    kernel = visual.patch_embed.proj.weight.sum(dim=(1, 2)).reshape(
        -1, half * half
    )  # grey: channels and frames are equal
    hidden = patches @ kernel.T
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=pixels.device)
    cos, sin = visual.rotary_pos_emb(hidden, places)
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(num_cells, 4, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(num_cells * 4, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden)


def normalise(cells: np.ndarray) -> torch.Tensor:
    """uint8 cells to the image processor's range."""
    return torch.from_numpy(cells.astype(np.float32) / 127.5 - 1.0)


def all_inks(pool: DigitPool) -> list[CellInk]:
    """Every cell the split can show, in the order of the feature table: blank, bar, then digits by position and variant."""
    digits = [CellInk(position, variant) for position in range(len(pool.ids)) for variant in range(NUM_VARIANTS)]
    return [CellInk(BLANK), CellInk(BAR), *digits]


def labels_of(pool: DigitPool) -> np.ndarray:
    """Class of every position of the pool."""
    labels = np.zeros(len(pool.ids), np.int64)
    for value, positions in enumerate(pool.by_value):
        labels[list(positions)] = value
    return labels


def warp(cells: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small random rotations, scalings, shears and shifts of cells (n, 28, 28)."""
    num_cells = cells.shape[0]
    draw = torch.rand(num_cells, 6, generator=generator) * 2 - 1
    angle, scale = draw[:, 0] * math.radians(12), 1 + 0.1 * draw[:, 1:3]
    cos, sin, shear = angle.cos(), angle.sin(), 0.12 * draw[:, 3]
    top = torch.stack([cos * scale[:, 0], shear - sin, 0.05 * draw[:, 4]], dim=1)
    bottom = torch.stack([sin, cos * scale[:, 1], 0.05 * draw[:, 5]], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), [num_cells, 1, CELL_PX, CELL_PX], align_corners=False)
    return 1 - F.grid_sample(1 - cells[:, None], grid, align_corners=False)[:, 0]  # outside the cell is paper, 1


def train_vision(
    visual: Qwen2_5_VisionTransformerPretrainedModel, pools: dict[str, DigitPool], num_steps: int, seed: int
) -> dict[str, float]:
    """Train the tower and its merger in place to classify cells; accuracy on held-out digits is returned."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    inks = all_inks(pools["train"])
    cells = normalise(np.stack([draw_cell(ink, pools["train"]) for ink in inks]))
    labels = torch.from_numpy(np.concatenate([[10, 11], np.repeat(labels_of(pools["train"]), NUM_VARIANTS)]))
    head = torch.nn.Linear(visual.config.out_hidden_size, NUM_CLASSES)
    parameters = [*visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.05, betas=(0.9, 0.98))
    started = time.monotonic()
    batch_size = 256
    for step in range(num_steps):
        rate = 1.5e-3 * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = torch.randint(len(inks), (batch_size,), generator=generator)
        chosen[:8] = torch.tensor([0, 1] * 4)
        shown = cells[chosen]
        shown[batch_size // 4 :] = warp(shown[batch_size // 4 :], generator)
        features = encode_cells(visual, shown)
        size = features.pow(2).mean(dim=1)
        loss = (
            F.cross_entropy(head(features), labels[chosen], label_smoothing=0.05)
            + 0.1 * (size - FEATURE_RMS**2).pow(2).mean()
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == num_steps - 1:
            accuracy = held_out_accuracy(visual, head, pools["test"])
            log.info(
                "vision %d loss %.3f held-out %.4f %.0f s", step, loss.item(), accuracy, time.monotonic() - started
            )
    return {"held_out_digit_accuracy": held_out_accuracy(visual, head, pools["test"])}


@torch.no_grad()
def held_out_accuracy(
    visual: Qwen2_5_VisionTransformerPretrainedModel, head: torch.nn.Linear, pool: DigitPool
) -> float:
    """Share of held-out digits (centred, middle ink) that the linear head names."""
    cells = normalise(
        np.stack([draw_cell(CellInk(position, NUM_VARIANTS // 2), pool) for position in range(len(pool.ids))])
    )
    named = head(encode_cells(visual, cells)).argmax(dim=1).numpy()
    return float((named == labels_of(pool)).mean())


@torch.no_grad()
def feature_table(visual: Qwen2_5_VisionTransformerPretrainedModel, pool: DigitPool) -> torch.Tensor:
    """(2 + digits * variants, out_hidden_size): features of every cell of `all_inks`."""
    inks = all_inks(pool)
    parts = [
        encode_cells(visual, normalise(np.stack([draw_cell(ink, pool) for ink in inks[start : start + 2048]])))
        for start in range(0, len(inks), 2048)
    ]
    return torch.cat(parts)

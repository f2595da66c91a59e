"""Warm start of the vision tower: every image token learns to tell what lies under it. Called by the warm start.

A token owns the digit or bar whose middle it covers. Its feature is taught, by linear heads that are dropped afterwards, what the
thing is, where its box is in the picture, and how it stands among the others (place from the left, among all and among its like;
largest or smallest of its like). The language model then has to read this off, no more.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)

from examples.digits.coordinates import BASIS_WIDTH, around, basis
from examples.digits.rendering import BAR, Scene, Thing, draw, in_thousandths
from examples.digits.scenes import from_left

TOKEN_PX = 28
"""An image token of Qwen2.5-VL covers 2 x 2 merged patches of 14 px."""
NOTHING = 11
NUM_RANKS = 6
TRAITS = (12, NUM_RANKS, NUM_RANKS, NUM_RANKS, 2, 2)
"""Classes of: content (digits, BAR, NOTHING); places from the left among all and among its like, from 0; number of its like, less
one; whether it is the largest and the smallest of its like."""
FEATURE_RMS = 0.5
BOX_DEVIATION = 3.0
"""Of the distribution taught around every edge, thousandths."""


def grid_of(scene: Scene) -> tuple[int, int]:
    """Rows and columns of image tokens: what Qwen2.5-VL's image processor makes of the picture's size."""
    return round(scene.height / TOKEN_PX), round(scene.width / TOKEN_PX)


def resized(scene: Scene, rng: random.Random) -> np.ndarray:
    """The drawn picture as the tower sees it, uint8."""
    rows, columns = grid_of(scene)
    picture = Image.fromarray(draw(scene, rng))
    return np.asarray(picture.resize((columns * TOKEN_PX, rows * TOKEN_PX), Image.Resampling.BICUBIC))


def encode(visual: Qwen2_5_VisionTransformerPretrainedModel, pictures: np.ndarray) -> torch.Tensor:
    """Features (n, rows * columns, out_hidden_size) of grey pictures (n, height, width) of one size, in reading order.

    Equals the tower's own forward, whose attention is full in every block, in one batch.
    """
    num, height, width = pictures.shape
    pixels = torch.from_numpy(pictures.astype(np.float32) / 127.5 - 1.0)
    rows, columns, half = height // TOKEN_PX, width // TOKEN_PX, TOKEN_PX // 2
    blocks = pixels.view(num, rows, 2, half, columns, 2, half).permute(0, 1, 4, 2, 5, 3, 6)
    patches = blocks.reshape(num, rows * columns * 4, half * half)
    # Grey: channels are equal, and so are the two frames.
    kernel = visual.patch_embed.proj.weight.sum(dim=(1, 2)).reshape(-1, half * half)
    hidden = F.linear(patches, kernel)
    at = torch.stack(torch.meshgrid(*(torch.arange(2 * each) for each in (rows, columns)), indexing="ij"), dim=-1)
    places = at.view(rows, 2, columns, 2, 2).transpose(1, 2).reshape(-1, 2)
    cos, sin = visual.rotary_pos_emb(hidden, places)
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(num, len(places), 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        hidden = hidden + attention.proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden).view(num, rows * columns, -1)


@dataclass(frozen=True)
class Owned:
    """What the image tokens of one picture are taught.

    contents: (tokens,); tokens: (things,), the owners; traits: (things, len(TRAITS)); boxes: (things, 4), thousandths.
    """

    contents: np.ndarray
    tokens: np.ndarray
    traits: np.ndarray
    boxes: np.ndarray


def owned(scene: Scene) -> Owned:
    """The things of a scene by the token that covers their middle; of two over one token, the larger."""
    rows, columns = grid_of(scene)
    owners: dict[int, Thing] = {}
    for thing in sorted(scene.things, key=lambda thing: thing.area):
        x1, y1, x2, y2 = thing.box
        column = int((x1 + x2) / 2 / scene.width * columns)
        owners[int((y1 + y2) / 2 / scene.height * rows) * columns + column] = thing
    contents = np.full(rows * columns, NOTHING)
    for token, thing in owners.items():
        contents[token] = thing.value
    size = (scene.width, scene.height)
    return Owned(
        contents,
        np.array(list(owners), np.int64),
        np.array([traits_of(thing, scene.things) for thing in owners.values()]),
        np.array([in_thousandths(thing.box, size) for thing in owners.values()]),
    )


def traits_of(thing: Thing, things: Sequence[Thing]) -> tuple[int, ...]:
    """See TRAITS."""
    others = from_left([other for other in things if (other.value == BAR) == (thing.value == BAR)])
    like = [other for other in others if other.value == thing.value]
    last = NUM_RANKS - 1
    return (
        thing.value,
        min(others.index(thing), last),
        min(like.index(thing), last),
        min(len(like) - 1, last),
        int(thing.area == max(other.area for other in like)),
        int(thing.area == min(other.area for other in like)),
    )


class Heads(torch.nn.Module):
    """Linear readings of image tokens' features, or of the hidden states that come of them."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.RMSNorm(width)
        self.traits = torch.nn.Linear(width, sum(TRAITS))
        self.boxes = torch.nn.Linear(width, 4 * BASIS_WIDTH)
        self.register_buffer("basis", basis(), persistent=False)

    def contents(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (n, 12) of tokens (n, width)."""
        return F.linear(self.norm(features), self.traits.weight[: TRAITS[0]], self.traits.bias[: TRAITS[0]])

    def forward(self, features: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Logits of every trait (n, classes), and of every edge of the box (n, 4, 1001), of owners (n, width)."""
        hidden = self.norm(features)
        edges = self.boxes(hidden).view(-1, 4, BASIS_WIDTH)
        return self.traits(hidden).split(TRAITS, dim=1), F.linear(edges, self.basis)

    def loss(self, features: torch.Tensor, truth: Sequence[Owned]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean cross entropies over tokens (n, tokens, width), and how well they tell: content, rank, IoU of the likeliest box."""
        at = torch.from_numpy(
            np.concatenate([index * features.shape[1] + each.tokens for index, each in enumerate(truth)])
        )
        flat = features.flatten(0, 1)
        contents = torch.from_numpy(np.stack([each.contents for each in truth]).reshape(-1))
        traits = torch.from_numpy(np.concatenate([each.traits for each in truth]))
        boxes = torch.from_numpy(np.concatenate([each.boxes for each in truth]))
        logits, edges = self(flat[at])
        content_loss = F.cross_entropy(self.contents(flat), contents)
        trait_losses = [F.cross_entropy(each, traits[:, place]) for place, each in enumerate(logits)]
        box_loss, overlaps = box_losses(edges, boxes)
        figures = {
            "content": (logits[0].argmax(1) == traits[:, 0]).float().mean().item(),
            "rank": (logits[2].argmax(1) == traits[:, 2]).float().mean().item(),
            "iou": overlaps.mean().item(),
            "iou>.9": (overlaps >= 0.9).float().mean().item(),
            "iou>.95": (overlaps >= 0.95).float().mean().item(),
        }
        return content_loss + 0.5 * sum(trait_losses[1:], trait_losses[0]) + box_loss, figures


def box_losses(edges: torch.Tensor, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy of edges' logits (n, 4, 1001) against boxes (n, 4), and the IoU (n,) of the likeliest boxes."""
    wanted = around(boxes.reshape(-1), torch.full((boxes.numel(),), BOX_DEVIATION))
    return F.cross_entropy(edges.float().flatten(0, 1), wanted), iou(edges.detach().argmax(dim=-1), boxes)


def iou(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(n,) of boxes (n, 4)."""
    low, high = torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])
    both = (high - low).clamp(min=0).prod(dim=1)
    areas = [(each[:, 2:] - each[:, :2]).clamp(min=0).prod(dim=1) for each in (one, other)]
    return both / (areas[0] + areas[1] - both).clamp(min=1)


def tower_loss(
    visual: Qwen2_5_VisionTransformerPretrainedModel, heads: Heads, scenes: Sequence[Scene], rng: random.Random
) -> tuple[torch.Tensor, dict[str, float]]:
    """The heads' loss on scenes of one grid; features are kept near FEATURE_RMS, the size of a word's embedding."""
    features = encode(visual, np.stack([resized(scene, rng) for scene in scenes]))
    loss, figures = heads.loss(features, [owned(scene) for scene in scenes])
    size = features.float().square().mean(dim=-1)
    return loss + 0.1 * (size - FEATURE_RMS**2).square().mean(), figures

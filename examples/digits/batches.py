"""Training batches of the language model: several questions share one picture, each sees the picture and itself only.

A row is `<prefix with image> question1 response1 question2 response2 …`. Positions (M-RoPE) of every question continue from the
prefix, and the attention mask hides the questions from each other, so a row trains exactly what separate sequences would.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from examples.digits.coordinates import NUM_COORDINATES
from examples.digits.demonstrations import Noise, Thousandths, boxes_of, exercises, respond_noisily
from examples.digits.micro_vlm import (
    FIRST_LAST,
    IM_END_ID,
    IM_START_ID,
    IMAGE_PAD_ID,
    PAD_ID,
    VISION_END_ID,
    VISION_START_ID,
)
from examples.digits.rendering import Scene, in_thousandths
from examples.digits.scenes import PERCEPTION, TASKS, Question, from_left
from examples.digits.streams import Asked
from examples.digits.vision import grid_of
from vtriune.data.prompt_pool import append_cot

EXERCISE = len(TASKS)
"""The loss group of auxiliary questions."""


Edge = tuple[int, float, float, float]
"""Exact thousandths, deviations of the steady and of the careless hand, weight in the loss."""
LEFT_EDGE_WEIGHT = 5.0
"""Which thing a box is of is decided by its first edge alone; the others follow from that one."""


@dataclass(frozen=True)
class Part:
    """One question with its answer. is_answer[i]: token i is the demonstrator's; edges[i]: the box edge that token i names, else None;
    named: tokens of the prompt that name a digit in the picture, with the box of the leftmost such; group: of the loss."""

    ids: list[int]
    is_answer: list[bool]
    edges: list[Edge | None]
    named: list[tuple[int, Thousandths]]
    group: int


@dataclass(frozen=True)
class Batch:
    """Padded rows of pictures of one grid.

    ids: (B, L); positions: (3, B, L); mask: (B, 1, L, L) bool; loss_at: flat positions in (B, L) whose next token is learned; targets,
    groups: (n,) there; edges_at: which of the n are edges; edges: (edges, 4), see `Edge`;
    named_at: flat positions of tokens that name a digit; named: (named, 4), see `Part`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    loss_at: torch.Tensor
    targets: torch.Tensor
    groups: torch.Tensor
    edges_at: torch.Tensor
    edges: torch.Tensor
    named_at: torch.Tensor
    named: torch.Tensor


class Writer:
    """Turns scenes and their questions into batches."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        noise: Noise,
        rng: random.Random,
        num_questions: int = 2,
        num_exercises: int = 2,
        cot_share: float = 0.15,
    ) -> None:
        self.noise, self.rng = noise, rng
        self.num_questions, self.num_exercises, self.cot_share = num_questions, num_exercises, cot_share
        self.encode = functools.lru_cache(200_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.first_id = len(tokenizer) - (2 * NUM_COORDINATES - FIRST_LAST)
        """Of the coordinates."""
        self.digits = {self.encode(text)[0]: value for value in range(10) for text in (f" {value}", str(value))}
        self.opening = (IM_START_ID, *self.encode("user\n"), VISION_START_ID)
        self.turn = (IM_END_ID, *self.encode("\n"), IM_START_ID, *self.encode("assistant\n"))

    def batch(self, asked: Sequence[Asked]) -> Batch:
        """Pictures of one grid with some of their questions and exercises each."""
        rows, columns = grid_of(asked[0][0])
        start, num_tokens = len(self.opening), rows * columns
        prefix = [*self.opening, *[IMAGE_PAD_ID] * num_tokens]
        order = np.arange(num_tokens)
        image = np.stack([order * 0, order // columns, order % columns]) + start
        at = np.concatenate([np.tile(np.arange(start), (3, 1)), image], axis=1)
        return collate(prefix, at, start + max(rows, columns), [self.parts(*each) for each in asked])

    def parts(self, scene: Scene, questions: Sequence[Question], task: str) -> list[Part]:
        """The questions asked about one picture."""
        asked = self.rng.sample(list(questions), min(len(questions), self.num_questions))
        more = self.rng.sample(exercises(scene, self.rng), self.num_exercises)
        parts = [self.part(question, scene, TASKS.index(task)) for question in asked]
        return parts + [self.part(question, scene, EXERCISE) for question in more]

    def part(self, question: Question, scene: Scene, group: int) -> Part:
        """A question and what a demonstrator writes; edges come from the demonstrator's hand."""
        prompt = question.prompt
        if not question.things and group != EXERCISE and self.rng.random() < self.cot_share:
            prompt = append_cot(prompt, self.rng)
        opening = [VISION_END_ID, *self.encode(prompt), *self.turn]
        answer = [*self.encode(respond_noisily(question, scene, self.noise, self.rng)), IM_END_ID]
        edges: list[Edge | None] = [None] * (len(opening) + len(answer))
        if question.task in PERCEPTION:
            exact = iter([(box, place) for _, box in boxes_of(question, scene) for place in range(4)])
            for place, token in enumerate(answer):
                if token >= self.first_id:
                    box, edge = next(exact)
                    side = box[edge % 2 + 2] - box[edge % 2]
                    edges[len(opening) + place] = (
                        box[edge],
                        self.noise.hand.small * side,
                        self.noise.hand.large * side,
                        LEFT_EDGE_WEIGHT if edge == 0 else 1.0,
                    )
                    answer[place] = self.drawn(token, box[edge], side, is_last=edge == 3)
        is_answer = [False] * len(opening) + [True] * len(answer)
        return Part(opening + answer, is_answer, edges, self.named(opening, scene), group)

    def named(self, opening: list[int], scene: Scene) -> list[tuple[int, Thousandths]]:
        """See `Part`."""
        leftmost = {thing.value: thing for thing in reversed(from_left(scene.things))}
        places = ((place, self.digits[token]) for place, token in enumerate(opening) if token in self.digits)
        size = (scene.width, scene.height)
        return [(place, in_thousandths(leftmost[value].box, size)) for place, value in places if value in leftmost]

    def drawn(self, token: int, exact: int, side: int, *, is_last: bool) -> int:
        """The token of an edge as this demonstrator's hand draws it."""
        hand = self.noise.hand
        share = hand.small if self.rng.random() < hand.careful else hand.large
        lowest = FIRST_LAST if is_last else 0
        value = min(max(round(exact + self.rng.gauss(0, share * side)), lowest), NUM_COORDINATES - 1)
        return token + value - exact


def collate(prefix: list[int], prefix_positions: np.ndarray, base: int, rows: Sequence[Sequence[Part]]) -> Batch:
    """Pad the rows, each `prefix` and then its parts, whose positions begin at `base`."""
    lengths = [len(prefix) + sum(len(part.ids) for part in parts) for parts in rows]
    shape = (len(rows), max(lengths))
    ids, segments, groups = np.full(shape, PAD_ID), np.full(shape, -1), np.full(shape, -1)
    positions, is_learned = np.zeros((3, *shape), np.int64), np.zeros(shape, bool)
    edges: dict[int, Edge] = {}
    named: dict[int, Thousandths] = {}
    for row, parts in enumerate(rows):
        end = len(prefix)
        ids[row, :end], segments[row, :end], positions[:, row, :end] = prefix, 0, prefix_positions
        for number, part in enumerate(parts, 1):
            begin, end = end, end + len(part.ids)
            ids[row, begin:end], segments[row, begin:end], groups[row, begin:end] = part.ids, number, part.group
            positions[:, row, begin:end] = base + np.arange(end - begin)
            is_learned[row, begin - 1 : end - 1] = part.is_answer
            named |= {row * shape[1] + begin + place: box for place, box in part.named}
            # What is learned at a place is the token after it.
            edges |= {row * shape[1] + begin + i - 1: edge for i, edge in enumerate(part.edges) if edge is not None}
    causal = np.tril(np.ones((shape[1], shape[1]), bool))
    query, key = segments[:, :, None], segments[:, None, :]
    mask = (causal & ((key == 0) | (query == key)) & (query >= 0) & (key >= 0)) | np.eye(shape[1], dtype=bool)
    loss_at = np.flatnonzero(is_learned.reshape(-1))
    place_of = {flat: place for place, flat in enumerate(loss_at.tolist())}
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(mask[:, None]),
        torch.from_numpy(loss_at),
        torch.from_numpy(ids.reshape(-1)[loss_at + 1]),
        torch.from_numpy(groups.reshape(-1)[loss_at + 1]),
        torch.tensor([place_of[flat] for flat in edges], dtype=torch.int64),
        torch.tensor(list(edges.values()), dtype=torch.float32).reshape(-1, 4),
        torch.tensor(list(named), dtype=torch.int64),
        torch.tensor(list(named.values()), dtype=torch.int64).reshape(-1, 4),
    )

"""Training batches of the warm start: several questions share one image, each sees the image and itself only.

A row is `<prefix with image> question1 response1 question2 response2 …`. Positions (M-RoPE) of every question continue from the
prefix, and the attention mask hides the questions from each other, so a row trains exactly what separate sequences would.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from examples.digits.demonstrations import Noise, reading_exercises, respond_noisily
from examples.digits.micro_vlm import IM_END_ID, IM_START_ID, IMAGE_PAD_ID, PAD_ID, VISION_END_ID, VISION_START_ID
from examples.digits.rendering import NUM_VARIANTS, CellInk, DigitPool, choose_ink
from examples.digits.scenes import PERCEPTION, SCENES, TASKS, Scene, spots
from vtriune.data.prompt_pool import append_cot

TRAITS = (12, 4, 4, 10, 4)  # classes of each trait of a cell
PLACES = (4, 4, 5)  # classes of what a digit named in a question says about the image: first row, first column, count
LOOKUPS = ("chart", "counting", "grounding", "detection")  # tasks whose questions name a digit to look for
EXERCISE = len(TASKS)  # the loss group of auxiliary questions


@dataclass(frozen=True)
class Mixture:
    """What the stream draws: shares of tasks, auxiliary questions per image, noise of the demonstrations."""

    noise: Noise
    task_weights: tuple[float, ...] = (1.0,) * len(TASKS)
    num_questions: int = 2
    num_exercises: int = 2
    cot_share: float = 0.15


@dataclass(frozen=True)
class Row:
    """One packed sequence of L tokens.

    positions: (3, L); segments: 0 for the prefix, k for question k; targets: -1 where no loss; groups: loss group per token;
    cells: row of the feature table per image token; traits: see `cell_traits`; named_at, places: tokens that name a digit to look
    for, and its PLACES.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    cells: np.ndarray
    traits: np.ndarray
    named_at: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class Part:
    """A stretch of a row: the prefix, or one question with its answer."""

    ids: list[int]
    segment: int
    group: int
    answer: list[int]

    def targets(self) -> np.ndarray:
        """The next token where it belongs to the answer, else -1."""
        question = len(self.ids) - len(self.answer)
        return np.array([-1] * (question - 1) + self.answer + [-1] if self.answer else [-1] * question)


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    ids: (B, L); positions: (3, B, L); mask: (B, 1, L, L) bool; cells, traits: of all image tokens; named_at and loss_at: flat
    positions in (B, L), with places, targets and groups there.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    cells: torch.Tensor
    traits: torch.Tensor
    named_at: torch.Tensor
    places: torch.Tensor
    loss_at: torch.Tensor
    targets: torch.Tensor
    groups: torch.Tensor


class RowStream:
    """Endless rows from scenes of the train split."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pool: DigitPool, mixture: Mixture):
        self.pool = pool
        self.mixture = mixture
        self.encode = functools.lru_cache(200_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.digits = {self.encode(f" {value}")[0]: value for value in range(10)}
        self.opening = (IM_START_ID, *self.encode("user\n"), VISION_START_ID)
        self.turn = (IM_END_ID, *self.encode("\n"), IM_START_ID, *self.encode("assistant\n"))

    def cell_index(self, ink: CellInk) -> int:
        """Row of the feature table: 0 blank, 1 bar, then digits by position and variant."""
        return -1 - ink.position if ink.position < 0 else 2 + ink.position * NUM_VARIANTS + ink.variant

    def exchanges(self, scene: Scene, task: str, rng: random.Random) -> list[tuple[str, str, int]]:
        """(prompt, response, loss group) of the questions asked about one scene."""
        asked = rng.sample(scene.questions, min(len(scene.questions), self.mixture.num_questions))
        found = []
        for question in asked:
            prompt = question.prompt
            if task not in PERCEPTION and rng.random() < self.mixture.cot_share:
                prompt = append_cot(prompt, rng)
            found.append((prompt, respond_noisily(question, self.mixture.noise, rng), TASKS.index(task)))
        if self.mixture.num_exercises:
            first, *others = reading_exercises(scene.cells, rng)
            exercises = [first, *rng.sample(others, self.mixture.num_exercises - 1)]
            found += [(prompt, response, EXERCISE) for prompt, response in exercises]
        return found

    def named_digit(self, prompt: str, group: int, cells: list[list[int]]) -> tuple[int, list[int]] | None:
        """Where in the prompt's tokens a digit to look for is named, and its PLACES in the image; None where there is none."""
        if prompt.startswith("Where is each") or (group != EXERCISE and TASKS[group] in LOOKUPS):
            for offset, token in enumerate(self.encode(prompt)):
                if token in self.digits and (found := spots(cells, self.digits[token])):
                    return offset, [*found[0], min(len(found), PLACES[2] - 1)]
        return None

    def row(self, rng: random.Random) -> Row:
        """One image with its questions."""
        (task,) = rng.choices(TASKS, self.mixture.task_weights)
        scene = SCENES[task](rng)
        inks = choose_ink(scene.cells, self.pool, rng)
        num_rows, num_columns = len(scene.cells), len(scene.cells[0])
        num_cells, start = num_rows * num_columns, len(self.opening)
        order = np.arange(num_cells)
        parts = [Part([*self.opening, *[IMAGE_PAD_ID] * num_cells], 0, 0, [])]
        places, named_at = [], []
        for prompt, response, group in self.exchanges(scene, task, rng):
            opening = [VISION_END_ID, *self.encode(prompt), *self.turn]
            if named := self.named_digit(prompt, group, scene.cells):
                named_at.append(sum(len(part.ids) for part in parts) + 1 + named[0])
                places.append(named[1])
            answer = [*self.encode(response), IM_END_ID]
            parts.append(Part(opening + answer, len(parts), group, answer))
        image = np.stack([order * 0, order // num_columns, order % num_columns]) + start
        base = start + max(num_rows, num_columns)
        texts = [np.tile(base + np.arange(len(part.ids)), (3, 1)) for part in parts[1:]]
        return Row(
            ids=np.concatenate([part.ids for part in parts]),
            positions=np.concatenate([np.tile(np.arange(start), (3, 1)), image, *texts], axis=1),
            segments=np.concatenate([np.full(len(part.ids), part.segment) for part in parts]),
            targets=np.concatenate([part.targets() for part in parts]),
            groups=np.concatenate([np.full(len(part.ids), part.group) for part in parts]),
            cells=np.array([self.cell_index(ink) for line in inks for ink in line]),
            traits=cell_traits(scene.cells),
            named_at=np.array(named_at, np.int64),
            places=np.array(places, np.int64).reshape(-1, len(PLACES)),
        )

    def batches(self, seed: str, num_tokens: int, num_rows_sorted: int = 256) -> Iterator[Batch]:
        """Endless batches of about `num_tokens` padded tokens; rows of like length are batched together."""
        rng = random.Random(seed)
        while True:
            rows = sorted((self.row(rng) for _ in range(num_rows_sorted)), key=lambda row: len(row.ids))
            groups, current = [], []
            for row in rows:
                if current and (len(current) + 1) * len(row.ids) > num_tokens:
                    groups.append(current)
                    current = []
                current.append(row)
            rng.shuffle(groups)  # the last, incomplete group is left out: its rows are the longest of one draw
            if not groups:
                groups = [current]
            yield from (collate(group) for group in groups)


def cell_traits(cells: list[list[int]]) -> np.ndarray:
    """What auxiliary heads read from a cell's hidden state, (cells, len(TRAITS)).

    Content (10 blank, 11 bar), row, column, number of digits before it, number of equal digits before it.
    """
    found = []
    before: list[int] = []
    for row, line in enumerate(cells):
        for column, value in enumerate(line):
            content = value if value >= 0 else 9 - value  # blank 10, bar 11
            found.append(
                (content, row, column, sum(other >= 0 for other in before), before.count(value) if value >= 0 else 0)
            )
            before.append(value)
    return np.minimum(np.array(found), np.array(TRAITS) - 1)


def collate(rows: list[Row]) -> Batch:
    """Pad rows to a batch. A padding token attends to itself only."""
    num_rows, length = len(rows), max(len(row.ids) for row in rows)
    ids = np.full((num_rows, length), PAD_ID)
    segments = np.full((num_rows, length), -1)
    targets, groups = np.full((num_rows, length), -1), np.full((num_rows, length), -1)
    positions = np.zeros((3, num_rows, length), np.int64)
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size], segments[index, :size], targets[index, :size] = row.ids, row.segments, row.targets
        groups[index, :size], positions[:, index, :size] = row.groups, row.positions
    causal = np.tril(np.ones((length, length), bool))
    query, key = segments[:, :, None], segments[:, None, :]
    mask = (causal & ((key == 0) | (query == key)) & (query >= 0) & (key >= 0)) | np.eye(length, dtype=bool)
    loss_at = np.flatnonzero(targets.reshape(-1) >= 0)
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(mask[:, None]),
        torch.from_numpy(np.concatenate([row.cells for row in rows])),
        torch.from_numpy(np.concatenate([row.traits for row in rows])),
        torch.from_numpy(np.concatenate([row.named_at + index * length for index, row in enumerate(rows)])),
        torch.from_numpy(np.concatenate([row.places for row in rows])),
        torch.from_numpy(loss_at),
        torch.from_numpy(targets.reshape(-1)[loss_at]),
        torch.from_numpy(groups.reshape(-1)[loss_at]),
    )

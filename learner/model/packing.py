"""Groups → packs: one flat token sequence in which every group's prompt stands once. Pure numpy; called by `learner.learner`.

A pack of two groups with two completions each (a completion's last token predicts nothing and is no input):

    row      0 1 2 | 3 4 | 5    | 6 7 8 9 | 10   | 11 12
    token    p p p | a a | b    | q q q q | c    | d  d
    group    0 0 0 | 0 0 | 0    | 1 1 1 1 | 1    | 1  1
    segment  -1    | 0   | 1    | -1      | 2    | 3

A row attends to an earlier-or-same row of its group that belongs to the prompt or to its own segment. Positions of every
completion continue from its prompt, so each row sees what it would see if its trajectory were alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class PromptTokens:
    """A group's shared prefix: P tokens and their rotary positions."""

    token_ids: np.ndarray
    """int64 (P,)"""
    positions: np.ndarray
    """int64 (3, P): temporal, height, width; all equal for text"""

    @property
    def next_position(self) -> int:
        """Position of the first token after the prompt, in all three axes."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Completions of one group that share one copy of its prompt; a group within the budget is one piece."""

    group: int
    completions: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """N rows holding n pieces with S completions in all, predicting R response tokens."""

    token_ids: np.ndarray
    """int64 (N,)"""
    positions: np.ndarray
    """int64 (3, N)"""
    prompt_spans: np.ndarray
    """int64 (n, 2): first row and number of rows of each prompt"""
    answer_spans: np.ndarray
    """int64 (n, 2): the rows of all completions of a piece, contiguous after its prompt"""
    segment_spans: np.ndarray
    """int64 (S, 2): rows of each completion; zero rows for a one-token completion"""
    source_rows: np.ndarray
    """int64 (R,): the row whose hidden state predicts each response token"""
    target_ids: np.ndarray
    """int64 (R,)"""
    segment_of_target: np.ndarray
    """int64 (R,): which of the S completions a response token belongs to"""
    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows_alone(self) -> int:
        """Rows if every completion came with a prompt of its own."""
        copies = [len(piece.completions) for piece in self.pieces]
        return int(self.prompt_spans[:, 1] @ copies + self.segment_spans[:, 1].sum())

    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Group and segment label of each row, int32 (N,) each, as in the module's picture."""
        lengths = self.prompt_spans[:, 1] + self.answer_spans[:, 1]
        group = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        segment = np.full(self.num_rows, -1, np.int32)
        for index, (first, length) in enumerate(self.segment_spans):
            segment[first : first + length] = index
        return group, segment


def pack(
    pieces: Sequence[Piece], prompts: Mapping[int, PromptTokens], responses: Mapping[int, Sequence[np.ndarray]]
) -> Pack:
    """Lay `pieces` out one after another, each with `prompts[g]` and `responses[g][i]` (integers (T,)) of its group.

    None is empty: `learner.batch.examples` refuses such groups.
    """
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    spans: dict[str, list[tuple[int, int]]] = {"prompt": [], "answer": [], "segment": []}
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    row = 0
    for piece in pieces:
        prompt = prompts[piece.group]
        num_prompt = len(prompt.token_ids)
        tokens.append(prompt.token_ids)
        positions.append(prompt.positions)
        spans["prompt"].append((row, num_prompt))
        last, row = row + num_prompt - 1, row + num_prompt
        first_answer, first_position = row, prompt.next_position
        for index in piece.completions:
            response = responses[piece.group][index]
            rows = len(response) - 1
            tokens.append(response[:rows])
            positions.append(np.broadcast_to(np.arange(first_position, first_position + rows), (3, rows)))
            spans["segment"].append((row, rows))
            sources.append(np.concatenate([[last], np.arange(row, row + rows)]))
            targets.append(response)
            row += rows
        spans["answer"].append((first_answer, row - first_answer))
    return Pack(
        token_ids=np.concatenate(tokens).astype(np.int64),
        positions=np.concatenate(positions, axis=1).astype(np.int64),
        prompt_spans=np.array(spans["prompt"], np.int64),
        answer_spans=np.array(spans["answer"], np.int64),
        segment_spans=np.array(spans["segment"], np.int64),
        source_rows=np.concatenate(sources).astype(np.int64),
        target_ids=np.concatenate(targets).astype(np.int64),
        segment_of_target=np.repeat(np.arange(len(targets)), [len(target) for target in targets]),
        pieces=tuple(pieces),
    )

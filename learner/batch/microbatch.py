"""Pieces → one micro-batch: the pack's tensors and, per response token, what the loss needs. Called by `learner.learner`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from learner.batch.examples import Example
from learner.batch.tokens import Tokens
from learner.model.packing import Pack, Piece, PromptTokens, pack
from learner.model.policy import Layout, PackInputs


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """R response tokens of S trajectories. Floats float32 (R,)."""

    pack: Pack
    inputs: PackInputs
    examples: tuple[Example, ...]
    """One per piece, in the pack's order; none: a dummy."""
    sampler: Tensor
    """log π_b as the sampler recorded it"""
    is_own: Tensor
    """bool (R,): sampled at the version that the learner starts this rollout batch with"""
    advantages: Tensor
    trajectory: Tensor
    """int64 (R,)"""
    source: np.ndarray
    """int64 (R,): index into the run's sources"""

    def tokens(self, logprobs: Tensor, prox: Tensor, *, trust_own: bool) -> Tokens:
        """The loss's view. `trust_own`: where the learner's own version sampled, π_b is π_prox itself.

        Both name the same policy there; what they differ by is rounding, which is measured (`mismatch/*`) and not trained on.
        """
        behaviour = torch.where(self.is_own, prox, self.sampler) if trust_own else self.sampler
        return Tokens(logprobs, prox, behaviour, self.advantages, self.trajectory, len(self.pack.segment_spans))


def micro_batch(
    pieces: Sequence[Piece],
    examples: Sequence[Example],
    prompts: dict[int, PromptTokens],
    *,
    version: int,
    sources: Sequence[str],
    layout: Layout,
) -> MicroBatch:
    """Pack `pieces` (indices into `examples`); `prompts` is keyed by the same indices. No pieces: a dummy of two tokens."""
    if not pieces:
        return _dummy(layout)
    responses = {
        piece.group: [t.token_ids for t in examples[piece.group].scored.group.trajectories] for piece in pieces
    }
    packed = pack(pieces, prompts, responses)
    owners = [(examples[piece.group], index) for piece in pieces for index in piece.completions]
    chosen = [item.scored.group.trajectories[index] for item, index in owners]
    lengths = [len(trajectory.token_ids) for trajectory in chosen]
    spans = [span for trajectory in chosen for span in trajectory.spans]
    versions = np.repeat([span.version for span in spans], [span.num_tokens for span in spans])
    names = [sources.index(item.scored.source) for item, _ in owners]
    values = np.array([item.advantages[index] for item, index in owners], np.float32)
    return MicroBatch(
        pack=packed,
        inputs=layout.inputs(packed),
        examples=tuple(examples[piece.group] for piece in pieces),
        sampler=layout.tensor(np.concatenate([trajectory.logprobs for trajectory in chosen]).astype(np.float32)),
        is_own=layout.tensor(versions == version),
        advantages=layout.tensor(np.repeat(values, lengths)),
        trajectory=layout.tensor(packed.segment_of_target),
        source=np.repeat(np.array(names, np.int64), lengths),
    )


def _dummy(layout: Layout) -> MicroBatch:
    """Work of weight 0 for a rank that has nothing in a micro-batch that the others run."""
    packed = pack(
        [Piece(0, (0,))],
        {0: PromptTokens(np.zeros(1, np.int64), np.zeros((3, 1), np.int64))},
        {0: [np.zeros(2, np.int64)]},
    )
    # Token 0 could be the image token of some tokenizer; a dummy holds no images.
    nothing = torch.zeros(2, device=layout.device)
    return MicroBatch(
        pack=packed,
        inputs=replace(layout, image_token_id=None).inputs(packed),
        examples=(),
        sampler=nothing,
        is_own=nothing.bool(),
        advantages=nothing,
        trajectory=nothing.long(),
        source=np.zeros(0, np.int64),
    )

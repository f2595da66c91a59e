"""Pieces → one micro-batch: the pack's tensors and, per response token, what the loss needs. Called by `learner.learner`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.examples import Example
from learner.losses import Tokens
from learner.packing import Pack, Piece, Prompt, pack
from learner.policy import PackInputs, to_inputs


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """R response tokens of S trajectories. Floats float32 (R,)."""

    pack: Pack
    inputs: PackInputs
    examples: tuple[Example, ...]
    """One per piece, in the pack's order."""
    sampler: Tensor
    """log π_b as the sampler recorded it"""
    is_own: Tensor
    """bool (R,): sampled at the version that the learner starts this rollout batch with"""
    advantages: Tensor
    trajectory: Tensor
    """int64 (R,)"""
    source: np.ndarray
    """int64 (R,): index into the run's sources"""
    is_dummy: bool = False

    @property
    def num_trajectories(self) -> int:
        return len(self.pack.segment_spans)

    def tokens(self, logprobs: Tensor, prox: Tensor, *, trust_own: bool) -> Tokens:
        """The loss's view. `trust_own`: where the learner's own version sampled, π_b is π_prox itself.

        Both name the same policy there; what they differ by is rounding, which is measured (`mismatch/*`) and not trained on.
        """
        behaviour = torch.where(self.is_own, prox, self.sampler) if trust_own else self.sampler
        return Tokens(logprobs, prox, behaviour, self.advantages, self.trajectory, self.num_trajectories)


@dataclass(frozen=True, slots=True)
class Layout:
    """What turns token ids into the model's inputs."""

    image_token_id: int | None
    num_position_axes: int
    device: torch.device


def micro_batch(
    pieces: Sequence[Piece],
    examples: Sequence[Example],
    prompts: dict[int, Prompt],
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
    chosen = [(examples[piece.group], index) for piece in pieces for index in piece.completions]
    lengths = [len(item.scored.group.trajectories[index].token_ids) for item, index in chosen]
    versions = np.concatenate([item.versions(index) for item, index in chosen])
    names = [sources.index(item.scored.source) for item, _ in chosen]
    values = np.array([item.advantages[index] for item, index in chosen], np.float32)

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(layout.device)

    return MicroBatch(
        pack=packed,
        inputs=to_inputs(packed, layout.image_token_id, layout.num_position_axes, layout.device),
        examples=tuple(examples[piece.group] for piece in pieces),
        sampler=on_device(
            np.concatenate([item.scored.group.trajectories[index].logprobs for item, index in chosen]).astype(
                np.float32
            )
        ),
        is_own=on_device(versions == version),
        advantages=on_device(np.repeat(values, lengths)),
        trajectory=on_device(packed.segment_of_target),
        source=np.repeat(np.array(names, np.int64), lengths),
    )


def _dummy(layout: Layout) -> MicroBatch:
    """Work of weight 0 for a rank that has nothing in a micro-batch that the others run."""
    packed = pack(
        [Piece(0, (0,))], {0: Prompt(np.zeros(1, np.int64), np.zeros((3, 1), np.int64))}, {0: [np.zeros(2, np.int64)]}
    )
    # Token 0 could be the image token of some tokenizer; a dummy holds no images.
    nothing = torch.zeros(2, device=layout.device)
    return MicroBatch(
        pack=packed,
        inputs=to_inputs(packed, None, layout.num_position_axes, layout.device),
        examples=(),
        sampler=nothing,
        is_own=nothing.bool(),
        advantages=nothing,
        trajectory=nothing.long(),
        source=np.zeros(0, np.int64),
        is_dummy=True,
    )

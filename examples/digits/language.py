"""Warm start of the language model: it reads off what the frozen tower tells, and answers as demonstrators do."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from examples.digits.batches import Batch
from examples.digits.coordinates import BASIS_WIDTH, NUM_COORDINATES, around, basis
from examples.digits.demonstrations import Hand
from examples.digits.micro_vlm import FIRST_LAST, IMAGE_PAD_ID
from examples.digits.scenes import TASKS
from examples.digits.vision import Heads, Owned, box_losses

HEADS_WEIGHT = 0.3
NAMES = (*TASKS, "exercises")


class Vocabulary(torch.nn.Module):
    """Embeddings of words, learned one by one, and of coordinates, which are waves (see `coordinates`); the same for the output.

    A coordinate has two tokens, with a comma and without, each with waves of its own. After the warm start all are ordinary rows.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        rows = model.model.language_model.embed_tokens.weight.data
        width = rows.shape[1]
        num_words = len(rows) - (2 * NUM_COORDINATES - FIRST_LAST)
        self.num_words = num_words
        self.words_in = torch.nn.Parameter(rows[:num_words].clone())
        self.words_out = torch.nn.Parameter(model.lm_head.weight.data[:num_words].clone())
        self.waves_in = torch.nn.Parameter(torch.randn(2, BASIS_WIDTH, width) * 0.05)
        self.waves_out = torch.nn.Parameter(torch.randn(2, BASIS_WIDTH, width) * 0.01)
        self.register_buffer("basis", basis(), persistent=False)

    def _rows(self, words: torch.Tensor, waves: torch.Tensor) -> torch.Tensor:
        return torch.cat([words, self.basis @ waves[0], self.basis[FIRST_LAST:] @ waves[1]])

    def inputs(self) -> torch.Tensor:
        """(vocabulary, width)."""
        return self._rows(self.words_in, self.waves_in)

    def outputs(self) -> torch.Tensor:
        """(vocabulary, width)."""
        return self._rows(self.words_out, self.waves_out)

    @torch.no_grad()
    def read(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        """Take the rows of a model that `write` has made, whose coordinates are waves therefore."""
        both = (
            (model.model.language_model.embed_tokens.weight, self.words_in, self.waves_in),
            (model.lm_head.weight, self.words_out, self.waves_out),
        )
        for rows, words, waves in both:
            first, with_comma = self.num_words, self.num_words + NUM_COORDINATES
            words.copy_(rows[:first])
            # The longest waves are nearly dependent: of all that fit, the smallest.
            waves[0] = torch.linalg.lstsq(self.basis, rows[first:with_comma], driver="gelsd").solution
            waves[1] = torch.linalg.lstsq(self.basis[FIRST_LAST:], rows[with_comma:], driver="gelsd").solution

    @torch.no_grad()
    def write(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        """Make the rows the model's."""
        model.model.language_model.embed_tokens.weight.copy_(self.inputs())
        model.lm_head.weight.copy_(self.outputs())


def language_loss(
    model: Qwen2_5_VLForConditionalGeneration,
    vocabulary: Vocabulary,
    heads: Heads,
    features: torch.Tensor,
    batch: Batch,
    truth: Sequence[Owned],
    hand: Hand,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weighted mean next-token loss of the responses, and the heads' on image tokens and named digits half-way; mean loss by task."""
    losses, states = response_losses(model, vocabulary, features, batch, hand)
    middle = len(states) // 2
    told = states[middle][batch.ids == IMAGE_PAD_ID].view(*features.shape)
    heads_loss, figures = heads.loss(told, truth)
    if len(batch.named_at):
        # A digit that is named knows its place one layer on: what looks it up later finds it there.
        named_loss, overlaps = box_losses(heads(states[middle + 1].flatten(0, 1)[batch.named_at])[1], batch.named)
        heads_loss, figures["named_iou"] = heads_loss + named_loss, overlaps.mean().item()
    by_task = {
        NAMES[group]: losses.detach()[batch.groups == group].mean().item() for group in batch.groups.unique().tolist()
    }
    weights = torch.ones_like(losses).index_copy(0, batch.edges_at, batch.edges[:, 3])
    return (weights * losses).mean() + HEADS_WEIGHT * heads_loss, by_task | {
        name: figures[name] for name in ("iou", "named_iou") if name in figures
    }


def response_losses(
    model: Qwen2_5_VLForConditionalGeneration,
    vocabulary: Vocabulary,
    features: torch.Tensor,
    batch: Batch,
    hand: Hand,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Losses (n,) of the batch's response tokens, and the hidden states (B, L, width) before and after every layer.

    features: (B, image tokens, width). An edge is learned as the distribution of the demonstrators' hands around it, not as the one
    token that was drawn.
    """
    embeds = F.embedding(batch.ids, vocabulary.inputs())
    embeds = embeds.masked_scatter((batch.ids == IMAGE_PAD_ID)[..., None], features.to(embeds.dtype))
    output = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": batch.mask},
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    hidden = output.last_hidden_state.flatten(0, 1)[batch.loss_at]
    log_probs = F.linear(hidden, vocabulary.outputs()).float().log_softmax(dim=-1)
    losses = -log_probs.gather(1, batch.targets[:, None])[:, 0]
    edges = edge_losses(log_probs, batch, hand, vocabulary.num_words)
    return losses.index_copy(0, batch.edges_at, edges), output.hidden_states


def edge_losses(log_probs: torch.Tensor, batch: Batch, hand: Hand, num_words: int) -> torch.Tensor:
    """Cross entropies (edges,) against the hands' distribution; the careful hand never draws finer than two thousandths."""
    exact, small, large, _ = batch.edges.unbind(1)
    wanted = hand.careful * around(exact, small.clamp(min=2.0))
    if hand.careful < 1:
        wanted = wanted + (1 - hand.careful) * around(exact, large.clamp(min=2.0))
    at, tokens = log_probs[batch.edges_at], batch.targets[batch.edges_at]
    is_last = tokens >= num_words + NUM_COORDINATES
    with_comma = at[:, num_words : num_words + NUM_COORDINATES]
    last = F.pad(at[:, num_words + NUM_COORDINATES :], (FIRST_LAST, 0))
    return -(wanted * torch.where(is_last[:, None], last, with_comma)).sum(dim=1)

"""Log-probability and entropy of response tokens, in chunks: the full logits of a batch never exist. Called by `learner.model.policy`.

With logits l = (h·Wᵀ)/τ and the blocked ids at −∞ (the sampler's processed distribution):
    log π(y) = l_y − lse(l)                      ∂/∂l_j = 1[j = y] − p_j
    H        = lse(l) − Σ_j p_j·l_j              ∂/∂l_j = −p_j·(l_j − lse(l) + H)
The backward pass recomputes a chunk's probabilities, so the peak is two chunks (three with an entropy bonus), whatever the number of
tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""At most this many bytes of float32 logits exist at a time (twice that with their probabilities or gradients)."""
_CACHED_ROWS_BYTES = 2 << 20
"""On the CPU a chunk that stays in the cache is walked over by every elementwise step at the cache's speed."""
_MIN_ROWS = 256
"""Fewer rows would waste the matrix product."""

# Finite, because 0·(−∞) is not a number; e^(−1e30 − lse) is exactly 0 in every float type used here.
_BLOCKED = -1e30


class TokenScores(NamedTuple):
    """Per response token."""

    logprobs: Tensor
    """float32 (R,)"""
    entropy: Tensor
    """float32 (R,), nats, of the distribution sampled from"""


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    blocked_ids: Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """Scores of `target_ids` int64 (R,) under `hidden` (R, D) and the output embedding `weight` (V, D), differentiable in both.

    `blocked_ids` int64 (B,) have probability 0; a blocked target's log-prob is meaningless and must not occur.
    """
    # The types that torch's `apply` does not declare.
    apply: Callable[[Tensor, Tensor, Tensor, float, Tensor | None, int], tuple[Tensor, Tensor]] = _Scores.apply
    return TokenScores(*apply(hidden, weight, target_ids, temperature, blocked_ids, chunk_bytes))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        blocked: Tensor | None,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        rows = _chunk_rows(hidden, weight, chunk_bytes)
        keeps = 4 * len(hidden) * weight.shape[0] <= chunk_bytes
        logprobs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(logprobs)
        kept: list[Tensor] = []
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, temperature, blocked)
            probabilities = torch.softmax(logits, -1)
            # Against the likeliest token, whose p is at least 1/V: safe in float32, exact for large logits, and half the time that
            # torch's logsumexp takes on a CPU.
            logits -= logits.amax(-1, keepdim=True)
            lse = probabilities.amax(-1).log_().neg_()
            logprobs[part] = logits.gather(-1, targets[part, None]).squeeze(-1).sub_(lse)
            entropy[part] = lse.sub_(torch.linalg.vecdot(probabilities, logits))
            if keeps:
                # Together they are no more than one chunk may be, and save the recomputation.
                kept.append(probabilities)
            del logits, probabilities
        ctx.save_for_backward(hidden, weight, targets, blocked, entropy, *kept)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, blocked, entropy, *kept = ctx.saved_tensors
        grad_logprobs, grad_entropy = grads
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for index, start in enumerate(range(0, len(hidden), ctx.rows)):
            part = slice(start, start + ctx.rows)
            probabilities = kept[index] if kept else _logits(hidden[part], weight, ctx.temperature, blocked).softmax(-1)
            delta = _logit_gradient(probabilities, targets[part], entropy[part], grad_logprobs, grad_entropy, part)
            del probabilities
            if ctx.temperature != 1.0:
                delta.div_(ctx.temperature)
            delta = delta.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(delta, weight, out=grad_hidden[part])
            if grad_weight is not None:
                if grad_weight.dtype == delta.dtype:
                    grad_weight.addmm_(delta.T, hidden[part])
                else:
                    grad_weight += delta.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _chunk_rows(hidden: Tensor, weight: Tensor, chunk_bytes: int) -> int:
    row_bytes = 4 * weight.shape[0]
    most = max(1, chunk_bytes // row_bytes)
    return most if hidden.is_cuda else min(most, max(_MIN_ROWS, _CACHED_ROWS_BYTES // row_bytes))


def _logits(hidden: Tensor, weight: Tensor, temperature: float, blocked: Tensor | None) -> Tensor:
    logits = (hidden @ weight.T).float()
    if temperature != 1.0:
        logits /= temperature
    if blocked is not None and len(blocked):
        logits.index_fill_(-1, blocked, _BLOCKED)
    return logits


def _logit_gradient(
    probabilities: Tensor,
    targets: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    part: slice,
) -> Tensor:
    """∂loss/∂l of one chunk (rows, V) from its probabilities, which are left as they are."""
    weight = torch.zeros_like(entropy)
    if grad_logprobs is not None:
        weight = weight - grad_logprobs[part]
    if grad_entropy is not None:
        weight = weight - grad_entropy[part] * entropy
    delta = probabilities * weight[:, None]
    if grad_entropy is not None:
        # −p·log p, which is 0 at p = 0.
        delta.addcmul_(torch.special.entr(probabilities), grad_entropy[part, None])
    return delta if grad_logprobs is None else delta.scatter_add_(-1, targets[:, None], grad_logprobs[part, None])

"""The loss on one page: surrogates, corrections for off-policy data, KL penalties. Pure tensor functions; called by `learner.learner`.

Per token t of trajectory i, with advantage A_i:
    r_it = π_θ/π_old       π_old is π_prox, except under `none` (see `Tokens.behaviour`)
    w_it = correction weight of π_prox/π_b, no gradient
    loss = (1/D) Σ_it [ w_it · surrogate(r_it, A_i) + kl_weight · KL_it − entropy_weight · H_it ]
D is fixed before any mask and counts the whole optimiser step, over all ranks and micro-batches. It is the number of tokens
(`grpo`, `cispo`), of trajectories (`gspo`), or trajectories × the token limit (`dr_grpo`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.batch.tokens import Tokens

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class Clip:
    """PPO's clip range [1 − low, 1 + high] and the dual clip's c (None: off)."""

    low: float = 0.2
    high: float = 0.28
    dual: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """Per-token loss (R,) before weight and denominator, and what its clip did."""

    loss: Tensor
    ratio: Tensor
    """(R,), detached"""
    clipped_low: Tensor
    clipped_high: Tensor
    """bool (R,): tokens whose gradient the clip removed, on either side"""


def grpo(tokens: Tokens, old: Tensor, clip: Clip) -> Surrogate:
    """−min(r·A, clip(r)·A), DAPO's clip-higher on GRPO (arXiv 2402.03300, 2503.14476); dual clip of arXiv 1912.09729 for A < 0."""
    return _clipped(torch.exp(_log_ratio(tokens.logprobs, old)), tokens.advantages, clip)


def gspo(tokens: Tokens, old: Tensor, clip: Clip) -> Surrogate:
    """GSPO-token (arXiv 2507.18071): s_i = exp(mean_t log r_it), and every trajectory weighs the same whatever its length."""
    log_ratio = _log_ratio(tokens.logprobs, old)
    length = _per_trajectory(torch.ones_like(log_ratio), tokens)
    mean = (_per_trajectory(log_ratio.detach(), tokens) / length)[tokens.trajectory]
    # Value e^mean on every token; gradient e^mean · ∇log π_θ, so that the tokens of a trajectory share s_i's gradient.
    ratio = torch.exp(mean + log_ratio - log_ratio.detach())
    result = _clipped(ratio, tokens.advantages, clip)
    return replace(result, loss=result.loss / length[tokens.trajectory])


def cispo(tokens: Tokens, old: Tensor, clip: Clip) -> Surrogate:
    """−sg(clip(r))·A·log π_θ (arXiv 2506.13585): the clip bounds a token's weight and never removes its gradient."""
    ratio = torch.exp(_log_ratio(tokens.logprobs.detach(), old))
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    loss = -weight * tokens.advantages * tokens.logprobs
    return Surrogate(loss, ratio, ratio < 1 - clip.low, ratio > 1 + clip.high)


LOSSES: dict[str, Callable[[Tokens, Tensor, Clip], Surrogate]] = {
    "grpo": grpo,
    "dr_grpo": grpo,
    "gspo": gspo,
    "cispo": cispo,
}


def denominator(kind: str, num_tokens: int, num_trajectories: int, max_tokens: int) -> int:
    """D of the module's formula. `dr_grpo` (arXiv 2503.20783) divides by a constant, so that length is not rewarded."""
    return {"gspo": num_trajectories, "dr_grpo": num_trajectories * max_tokens}.get(kind, num_tokens)


def old_logprobs(correction: str, tokens: Tokens) -> Tensor:
    """The denominator policy of the ratio: `none` takes r against π_b, the others correct π_prox/π_b by a weight instead."""
    return tokens.behaviour if correction == "none" else tokens.prox


def correction_weight(correction: str, tokens: Tokens, cap: float) -> Tensor:
    """w (R,), without gradient. `cap` is C.

    none: 1. decoupled (arXiv 2505.24298): min(w, C) per token. tis: min(Π_t w, C) over the trajectory.
    icepop: w where 0.5 ≤ w ≤ C, else 0, per token. Log-ratios are clamped to ±20, the sum of `tis` as well.
    """
    if correction == "none":
        return torch.ones_like(tokens.prox)
    log_ratio = _log_ratio(tokens.prox, tokens.behaviour)
    if correction == "tis":
        log_ratio = _per_trajectory(log_ratio, tokens).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)[tokens.trajectory]
    weight = torch.exp(log_ratio)
    if correction == "icepop":
        return torch.where((weight >= 0.5) & (weight <= cap), weight, torch.zeros_like(weight))
    return weight.clamp(max=cap)


def kl_penalty(kind: str, logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token estimate of KL(π_θ‖π_ref) (R,): k1 = −log q, mse = ½ log² q, k3 = q − 1 − log q,
    with q = π_ref/π_θ (joschu.net/blog/kl-approx)."""
    log_q = _log_ratio(reference, logprobs)
    if kind == "k1":
        return -log_q
    return 0.5 * log_q.square() if kind == "mse" else torch.expm1(log_q) - log_q


def _clipped(ratio: Tensor, advantages: Tensor, clip: Clip) -> Surrogate:
    plain, bounded = -ratio * advantages, -ratio.clamp(1 - clip.low, 1 + clip.high) * advantages
    loss = torch.maximum(plain, bounded)
    if clip.dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -clip.dual * advantages), loss)
    ratio = ratio.detach()
    return Surrogate(loss, ratio, (ratio < 1 - clip.low) & (advantages < 0), (ratio > 1 + clip.high) & (advantages > 0))


def _log_ratio(numerator: Tensor, denominator_: Tensor) -> Tensor:
    return (numerator - denominator_).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _per_trajectory(values: Tensor, tokens: Tokens) -> Tensor:
    """Sum over each trajectory's tokens, (S,)."""
    return values.new_zeros(tokens.num_trajectories).index_add(0, tokens.trajectory, values)

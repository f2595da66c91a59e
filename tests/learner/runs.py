"""One update's log-probs and gradients, ours and the oracle's, for the tests that compare them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learner.batch.advantages import advantages
from learner.learner import Learner, Update
from learner.model.policy import Policy
from learner.training_metrics import TrainingMetrics
from tests.learner import oracle
from tests.learner.worlds import World, config_with
from vtriune.messages import ScoredGroup, TrainOrder

Gradients = dict[str, Tensor]
Scores = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""(group id, completion) → (log-probs, entropies)"""


def order_of(groups: Sequence[ScoredGroup], **changes: Any) -> TrainOrder:
    """All groups in one on-policy update; each update is a tenth of the run."""
    updates = changes.get("updates", [[group.group.lease.group_id for group in groups]])
    keys: dict[str, Any] = {
        "version": 0, "updates": updates, "mode": "on_policy", "bound": 0, "max_staleness": 0, "correction": "none",
        "progress": [index / 10 for index in range(len(updates) + 1)],
    }  # fmt: skip
    return TrainOrder(**{**keys, **changes})


def prepared(
    policy: Policy, world: World, groups: Sequence[ScoredGroup], **sections: dict[str, Any]
) -> tuple[Learner, Update, TrainOrder, TrainingMetrics]:
    """A learner that is about to run one update; sections override the configuration."""
    learner = Learner(config_with(**sections), policy, world)
    order = order_of(groups)
    for group in groups:
        learner.deliver(group)
    metrics = TrainingMetrics(sorted({group.source for group in groups}))
    return (
        learner,
        learner._prepare(learner.inbox.take(order.updates[0], order.attempts), order, metrics),
        order,
        metrics,
    )


@torch.no_grad()
def scores_of(learner: Learner, update: Update) -> Scores:
    """Forward only."""
    scores: Scores = {}
    for micro in update.micro_batches:
        assert micro.examples
        logprobs, entropy = learner.policy(micro.inputs, *learner._vision(micro, update))
        chosen = [
            (item.group_id, index)
            for piece, item in zip(micro.pack.pieces, micro.examples, strict=True)
            for index in piece.completions
        ]
        for segment, key in enumerate(chosen):
            rows = micro.trajectory == segment
            scores[key] = (logprobs[rows], entropy[rows])
    return scores


def our_update(
    policy: Policy, world: World, groups: Sequence[ScoredGroup], **sections: dict[str, Any]
) -> tuple[Scores, Gradients]:
    """Scores and gradients of one update by the learner."""
    learner, update, order, metrics = prepared(policy, world, groups, **sections)
    scores = scores_of(learner, update)
    policy.zero_grad()
    learner._accumulate(update, order, metrics)
    return scores, gradients_of(policy.model)


def oracle_update(
    folder: Any, world: World, groups: Sequence[ScoredGroup], temperature: float = 1.0
) -> tuple[Scores, Gradients]:
    """The same by transformers' forward, one trajectory at a time, and the formula of the paper in plain autograd."""
    model = oracle.load(folder)
    scores: Scores = {}
    total = torch.zeros(())
    num_tokens = 0
    for group in groups:
        values = advantages([verdict.reward for verdict in group.verdicts])
        for index, value in enumerate(values):
            logprobs, entropy = oracle.logprobs_of(model, world, group, index, temperature)
            scores[group.group.lease.group_id, index] = (logprobs.detach(), entropy.detach())
            total = total - (torch.exp(logprobs - logprobs.detach()) * float(value)).sum()
            num_tokens += len(logprobs)
    (total / num_tokens).backward()
    return scores, gradients_of(model)


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_score_error(ours: Scores, theirs: Scores) -> float:
    """Largest absolute difference of any log-prob or entropy; the keys must be the same."""
    assert ours.keys() == theirs.keys()
    return max(float((a - b).abs().max()) for key in ours for a, b in zip(ours[key], theirs[key], strict=True))


def relative_gradient_error(ours: Gradients, theirs: Gradients) -> float:
    """‖difference‖/‖reference‖ over each parameter tensor that matters (norm above 1e-4 of the whole), the largest."""
    whole = float(torch.stack([g.norm() for g in theirs.values()]).norm())
    errors = [float((ours[name] - g).norm() / g.norm()) for name, g in theirs.items() if float(g.norm()) > 1e-4 * whole]
    assert len(errors) > len(theirs) // 2
    return max(errors)

"""Trains the policy on rollout batches. One `Learner` per rank, all ranks in step; `learner.actor` is its shell.

deliver ─▶ inbox ─▶ train(order): for each update
                      plan     which rank, which micro-batch (learner.balance)
                      prompts  positions and image features, once per group (learner.prompts)
                      forward  log-probs of response tokens over shared-prefix packs (learner.policy)
                      loss     global denominator, fixed before any mask (learner.losses)
                      step     clip, AdamW (learner.optimizer)
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from learner.balance import plan
from learner.examples import Example, Inbox, check_staleness, example
from learner.families import Family
from learner.feature_cache import open_cache
from learner.losses import LOSSES, Clip, correction_weight, denominator, kl_penalty, old_logprobs
from learner.microbatch import Layout, MicroBatch, micro_batch
from learner.optimizer import Optimizer, StepResult
from learner.packing import Piece, Prompt, pack
from learner.policy import Policy, to_inputs
from learner.prompts import Images, Prompts, Source, joined
from learner.publishing import device_of
from learner.tally import Tally
from vtriune.config.tree import Config
from vtriune.messages import SampleRef, ScoredGroup, TrainOrder, TrainReport

CAPS = {"none": 0.0, "decoupled": 2.0, "tis": 5.0, "icepop": 5.0}
"""C when `loss.correction_cap` is not set."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One optimiser step's work on this rank."""

    graded: list[MicroBatch]
    observed: list[MicroBatch]
    """Groups whose loss has no gradient: they run forward only, for the metrics."""
    denominator: int
    features: dict[Any, Tensor]
    """Image features by sample, when the tower is frozen."""


class Learner:
    """The trainer of one rank. `policy` may be sharded over `group`; `reference` is a frozen policy for the KL penalty."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        source: Source,
        *,
        group: dist.ProcessGroup | None = None,
        reference: Policy | None = None,
    ):
        self.config, self.policy, self.reference, self.group = config, policy, reference, group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.num_ranks = 1 if group is None else dist.get_world_size(group)
        self.family: Family = policy.family
        frozen = config.model.freeze
        self.prompts = Prompts(
            policy,
            source,
            is_tower_frozen="vit" in frozen and "connector" in frozen,
            open_disk=(lambda: open_cache(config, policy)) if config.model.feature_cache else None,
        )
        self.optimizer = Optimizer(
            policy.model,
            self.family,
            config.optimizer,
            group,
            keeps_state_on_host=config.model.offload == "optimizer",
        )
        self.inbox = Inbox()
        self._layout = Layout(self.prompts.image_token_id, self.family.num_position_axes, device_of(policy.model))
        self._width = int(self.family.decoder(policy.model).config.hidden_size)  # type: ignore[union-attr, arg-type]
        self._clip = Clip(config.loss.clip_low, config.loss.clip_high, config.loss.dual_clip)

    def deliver(self, scored: ScoredGroup) -> None:
        """Keep a group until it is ordered; duplicates are dropped and counted. Raises DeliveryError for a malformed one."""
        blocked = self.policy.blocked_ids.tolist()
        self.inbox.add(example(scored, scale_by_std=self.config.loss.kind != "dr_grpo", blocked_ids=blocked))

    def train(self, order: TrainOrder) -> TrainReport:
        """One rollout batch: every update of `order`. Collective. Raises StaleTrajectory, DeliveryError, PromptMismatch."""
        started = time.perf_counter()
        batches = [self.inbox.take(ids, order.attempts) for ids in order.updates]
        self.inbox.forget_below(order.open_from)
        examples = [item for batch in batches for item in batch]
        staleness = check_staleness(examples, order.version, order.max_staleness)
        tally = Tally(sorted({item.scored.source for item in examples}))
        prox = self._prox_ahead(batches, order, tally)
        steps: list[StepResult] = []
        num_empty = 0
        for index, batch in enumerate(batches):
            update = self._prepare(batch, order, tally)
            self._accumulate(update, order, tally, prox[index])
            self._free_gathered()
            if update.denominator:
                steps.append(self.optimizer.step(order.first_update + index, order.num_updates_total))
            else:
                num_empty += 1
        report = tally.metrics(self.group)
        report.update(_staleness_metrics(examples, staleness, order.version))
        report.update(_step_metrics(steps))
        report["loss"] = tally.total("loss") / max(len(batches), 1)
        report["updates/empty"] = float(num_empty)
        report["groups/unusable"] = float(sum(not item.used for item in examples))
        report["groups/duplicates"] = float(self.inbox.num_duplicates)
        report["time/learn_s"] = time.perf_counter() - started
        return TrainReport(order.version, report)

    @torch.no_grad()
    def score(self, sample: SampleRef, prompt_seed: int | None, response_ids: np.ndarray) -> list[float]:
        """Log-probs of one response to one sample, through the same path as training. Collective."""
        features = self.prompts.source(sample, prompt_seed)
        prompt = Prompt(
            features.prompt_ids.astype(np.int64), self.prompts.positions(features.prompt_ids, features.image_grid_thw)
        )
        packed = pack([Piece(0, (0,))], {0: prompt}, {0: [response_ids]})
        layout = self._layout
        inputs = to_inputs(packed, layout.image_token_id, layout.num_position_axes, layout.device)
        images = Images(features.pixel_values, features.image_grid_thw)
        pixels = joined([images], layout.device) if len(images.grid_thw) else None
        logprobs, _ = self.policy(inputs, None, pixels)
        return [float(value) for value in logprobs]

    def _prepare(self, batch: Sequence[Example], order: TrainOrder, tally: Tally) -> Update:
        """Plan, pack and, with a frozen tower, encode. Collective when the tower runs."""
        loss = self.config.loss
        keeps_all = bool(loss.kl_weight or loss.entropy_weight)
        # By id: the same parameters whatever the order of arrival.
        batch = sorted(batch, key=lambda item: item.group_id)
        graded = [index for index, item in enumerate(batch) if item.used and (item.has_signal or keeps_all)]
        observed = [index for index, item in enumerate(batch) if item.used and not (item.has_signal or keeps_all)]
        planned = [self._plan(batch, chosen) for chosen in (graded, observed)]
        mine = sorted({piece.group for rows in planned for pieces in rows for piece in pieces})
        features = self._encode([batch[index] for index in mine], tally) if self.prompts.is_tower_frozen else {}
        prompts = {index: self.prompts.prompt(batch[index].scored.group) for index in mine}
        sources = sorted(tally.sources)
        made = [
            [
                micro_batch(pieces, batch, prompts, version=order.version, sources=sources, layout=self._layout)
                for pieces in rows
            ]
            for rows in planned
        ]
        num_tokens, num_trajectories = sum(item.num_tokens for item in batch), sum(len(item.used) for item in batch)
        total = denominator(loss.kind, num_tokens, num_trajectories, self.config.sampling.max_tokens)
        return Update(made[0], made[1], total, features)

    def _plan(self, batch: Sequence[Example], chosen: Sequence[int]) -> list[list[Any]]:
        """This rank's micro-batches as pieces of `batch`; none on any rank when nothing is chosen."""
        if not chosen:
            return []
        budget, shared = self.config.optimizer.token_budget, self.config.model.attention != "padded"
        shapes = [batch[index].shape for index in chosen]
        plans = plan(shapes, self.num_ranks, budget, width=self._width, share_prompts=shared)
        return [[type(p)(chosen[p.group], p.completions) for p in pieces] for pieces in plans[self.rank]]

    def _encode(self, batch: Sequence[Example], tally: Tally) -> dict[Any, Tensor]:
        """Features of the batch's images: from the cache, or computed in as many tower calls as the neediest rank has."""
        started = time.perf_counter()
        groups = [item.scored.group for item in batch]
        have = self.prompts.at_hand(groups)
        calls = self.prompts.calls(self.prompts.missing(groups, have))
        for index in range(self._most(len(calls))):
            found = self.prompts.encode(calls[index] if index < len(calls) else [], self._layout.device)
            have.update(found)
            self.prompts.keep(found)
        tally.peak("vit_s", time.perf_counter() - started)
        return have

    def _most(self, count: int) -> int:
        """The largest `count` over ranks."""
        if self.num_ranks == 1 or self.family.visual is None:
            return count
        shared = torch.tensor([count])
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())

    def _prox_ahead(
        self, batches: Sequence[Sequence[Example]], order: TrainOrder, tally: Tally
    ) -> list[list[Tensor] | None]:
        """log π_prox of every update after the first, before anything moves. The first update's are its own forward's."""
        ahead: list[list[Tensor] | None] = [None]
        for batch in batches[1:]:
            update = self._prepare(batch, order, tally)
            with torch.no_grad():
                ahead.append([self._forward(micro, update)[0] for micro in (*update.graded, *update.observed)])
        return ahead

    def _accumulate(self, update: Update, order: TrainOrder, tally: Tally, prox: list[Tensor] | None) -> None:
        """Gradients of one update into the parameters. Every rank runs the same number of micro-batches."""
        for index, micro in enumerate((*update.graded, *update.observed)):
            is_graded = index < len(update.graded)
            self._sync_gradients(is_last=index == len(update.graded) - 1)
            with torch.set_grad_enabled(is_graded):
                logprobs, entropy = self._forward(micro, update)
                old = logprobs.detach() if prox is None else prox[index]
                loss = self._loss(micro, logprobs, entropy, old, update, order, tally)
                if is_graded:
                    # FSDP averages over ranks; the denominator is global already.
                    (loss * self.num_ranks).backward()

    def _forward(self, micro: MicroBatch, update: Update) -> tuple[Tensor, Tensor]:
        if self.prompts.is_tower_frozen:
            rows = [
                update.features[s]
                for item in micro.examples
                if (s := item.scored.group.lease.sample) in update.features
            ]
            result: tuple[Tensor, Tensor] = self.policy(micro.inputs, torch.cat(rows) if rows else None)
            return result
        if self.family.visual is None:
            return self.policy(micro.inputs)  # type: ignore[no-any-return]
        groups = [item.scored.group for item in micro.examples]
        images = [self.prompts.images(group) for group in groups if self.prompts.has_images(group)]
        return self.policy(micro.inputs, None, joined(images or [self.prompts.blank()], self._layout.device))  # type: ignore[no-any-return]

    def _loss(
        self,
        micro: MicroBatch,
        logprobs: Tensor,
        entropy: Tensor,
        prox: Tensor,
        update: Update,
        order: TrainOrder,
        tally: Tally,
    ) -> Tensor:
        if micro.is_dummy:
            return 0.0 * (logprobs.sum() + entropy.sum())
        section, correction = self.config.loss, order.correction
        tokens = micro.tokens(logprobs, prox, trust_own=correction in ("none", "decoupled"))
        surrogate = LOSSES[section.kind](tokens, old_logprobs(correction, tokens), self._clip)
        cap = section.correction_cap or CAPS[correction]
        weight = correction_weight(correction, tokens, cap)
        loss = weight * surrogate.loss
        if section.entropy_weight:
            loss = loss - section.entropy_weight * entropy
        if section.kl_weight and self.reference is not None:
            with torch.no_grad():
                reference, _ = self.reference(micro.inputs, self._reference_features(micro, update))
            penalty = kl_penalty(section.kl, logprobs, reference)
            tally.add("kl", float(penalty.detach().sum()))
            loss = loss + section.kl_weight * penalty
        total = loss.sum() / max(update.denominator, 1)
        tally.add("loss", float(total.detach()))
        tally.observe(micro, surrogate, weight, prox, entropy.detach(), cap, self.config.optimizer.token_budget)
        return total

    def _reference_features(self, micro: MicroBatch, update: Update) -> Tensor | None:
        rows = [
            update.features[s] for item in micro.examples if (s := item.scored.group.lease.sample) in update.features
        ]
        return torch.cat(rows) if rows else None

    def _free_gathered(self) -> None:
        """Drop FSDP's gathered copy of the root unit, which a forward-only pass leaves behind: after the step it would be stale."""
        reshard = getattr(self.policy, "reshard", None)
        if reshard is not None:
            reshard()

    def _sync_gradients(self, *, is_last: bool) -> None:
        """Reduce gradients once per update, at the last micro-batch that has any."""
        toggle = getattr(self.policy, "set_requires_gradient_sync", None)
        if toggle is not None:
            toggle(is_last)


def _staleness_metrics(examples: Sequence[Example], staleness: Sequence[int], version: int) -> dict[str, float]:
    """Over used trajectories, all and per source."""
    by_source: dict[str, list[int]] = {}
    for item in examples:
        ages = [version - item.scored.group.trajectories[index].oldest_version for index in item.used]
        by_source.setdefault(item.scored.source, []).extend(ages)
    result = {f"source/{name}/staleness/mean": float(np.mean(ages)) for name, ages in by_source.items() if ages}
    result["staleness/max"] = float(max(staleness, default=0))
    result["staleness/mean"] = float(np.mean(staleness)) if staleness else 0.0
    return result


def _step_metrics(steps: Sequence[StepResult]) -> dict[str, float]:
    """Means over the batch's steps; a non-finite norm is counted as a skipped update and left out of the means."""
    done = [step for step in steps if not step.is_skipped]
    result = {"updates/skipped": float(len(steps) - len(done)), "updates/done": float(len(done))}
    for key in done[0].norms if done else ():
        result["grad_norm" + ("/" + key if key else "")] = float(np.mean([step.norms[key] for step in done]))
    for module, rate in steps[-1].rates.items() if steps else ():
        result[f"lr/{module}"] = rate
    return result

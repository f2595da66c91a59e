"""Trains the policy on rollout batches. One `Learner` per rank, all ranks in step; `learner.actor` is its shell.

deliver ─▶ inbox ─▶ train(order): for each update
                      plan     which rank, which micro-batch (learner.batch.plan)
                      prompts  positions and image features, once per group (learner.batch.prompts)
                      forward  log-probs of response tokens over shared-prefix packs (learner.model.policy)
                      loss     global denominator, fixed before any mask (learner.losses)
                      step     clip, AdamW (learner.optimizer)
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from learner.batch.examples import Example, check_staleness, example
from learner.batch.feature_cache import FeatureCache, identity_of
from learner.batch.inbox import GroupInbox
from learner.batch.microbatch import MicroBatch, micro_batch
from learner.batch.plan import plan
from learner.batch.prompts import Images, Prompts, Source, joined
from learner.losses import LOSSES, Clip, correction_weight, denominator, kl_penalty, old_logprobs
from learner.model.families import Family
from learner.model.packing import Piece, pack
from learner.model.policy import Layout, Policy, Vision
from learner.model.sharding import device_of
from learner.optimizer import PolicyOptimizer, StepResult
from learner.training_metrics import TrainingMetrics
from vtriune.config.tree import Config
from vtriune.messages import Group, SampleRef, ScoredGroup, TrainOrder, TrainReport
from vtriune.runtime import report_step

CAPS = {"none": 0.0, "decoupled": 2.0, "tis": 5.0, "icepop": 5.0}
"""C when `loss.correction_cap` is not set."""


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One optimiser step's work on this rank, planned and packed."""

    graded: list[MicroBatch]
    observed: list[MicroBatch]
    """Groups whose loss has no gradient: they run forward only, for the metrics."""
    denominator: int
    groups: list[Group]
    """Those with work on this rank."""
    features: dict[SampleRef, Tensor]
    """Image features by sample, when the tower is frozen. Large: held by the update in hand only."""
    prox: list[Tensor] | None = None
    """log π_prox of each micro-batch, graded first; None: what this update's own forward gives."""

    @property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        return (*self.graded, *self.observed)


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
        folder = config.model.feature_cache
        self.prompts = Prompts(
            policy,
            source,
            is_tower_frozen={"vit", "connector"} <= set(config.model.freeze),
            open_disk=(lambda: FeatureCache(folder, identity_of(config, policy))) if folder else None,
        )
        self.optimizer = PolicyOptimizer(
            policy.model,
            self.family,
            config.optimizer,
            group,
            keeps_state_on_host=config.model.offload == "optimizer",
        )
        self.inbox = GroupInbox()
        self._layout = Layout(self.prompts.image_token_id, self.family.num_position_axes, device_of(policy.model))
        self._width = int(self.family.decoder(policy.model).config.hidden_size)
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
        metrics = TrainingMetrics(sorted({item.scored.source for item in examples}))
        steps: list[StepResult] = []
        for index, update in enumerate(self._updates(batches, order, metrics)):
            report_step("update", f"{index + 1} of {len(batches)} from version {order.version}")
            self._accumulate(update, order, metrics)
            self._free_gathered()
            report_step("training", "the optimizer's step")
            if update.denominator:
                steps.append(self.optimizer.step(*order.progress[index : index + 2]))
        report = metrics.reduced(self.group)
        report.update(_staleness_metrics(examples, staleness))
        report.update(_step_metrics(steps))
        if report["tokens/trained"]:
            report["loss"] = metrics.total("loss") / len(batches)
        if self.reference is None:
            report.pop("kl/reference", None)
        report["updates/empty"] = float(len(batches) - len(steps))
        report["groups/unusable"] = float(sum(not item.used for item in examples))
        report["groups/duplicates"] = float(self.inbox.num_duplicates)
        report["time/learn_s"] = time.perf_counter() - started
        return TrainReport(order.version, report)

    @torch.no_grad()
    def score(self, sample: SampleRef, prompt_seed: int | None, response_ids: np.ndarray) -> list[float]:
        """Log-probs of one response to one sample, through the same path as training. Collective."""
        features = self.prompts.source(sample, prompt_seed)
        packed = pack([Piece(0, (0,))], {0: self.prompts.prompt_of(features)}, {0: [response_ids]})
        images = Images(features.pixel_values, features.image_grid_thw)
        pixels = joined([images], self._layout.device) if len(images.grid_thw) else None
        logprobs, _ = self.policy(self._layout.inputs(packed), None, pixels)
        scores: list[float] = logprobs.tolist()
        return scores

    def _updates(
        self, batches: Sequence[Sequence[Example]], order: TrainOrder, metrics: TrainingMetrics
    ) -> Iterator[Update]:
        """Every update of `order` in turn, each planned and packed once; the packs of all take some 200 bytes a row meanwhile."""
        # Before the first is yielded, that is before anything moves.
        later = [self._with_prox(self._prepare(batch, order, metrics)) for batch in batches[1:]]
        for batch in batches[:1]:
            yield self._prepare(batch, order, metrics)
        for update in later:
            yield replace(update, features=self._encode(update.groups, metrics))

    @torch.no_grad()
    def _with_prox(self, update: Update) -> Update:
        """`update` with the log π_prox of now, its features let go until its turn comes."""
        prox = []
        for index, micro in enumerate(update.micro_batches, 1):
            report_step("training", f"log-probs before any update, micro-batch {index} of {len(update.micro_batches)}")
            prox.append(self.policy(micro.inputs, *self._vision(micro, update))[0])
        return replace(update, prox=prox, features={})

    def _prepare(self, batch: Sequence[Example], order: TrainOrder, metrics: TrainingMetrics) -> Update:
        """Plan, pack and, with a frozen tower, encode. Collective when the tower runs."""
        loss = self.config.loss
        keeps_all = bool(loss.kl_weight or loss.entropy_weight)
        # By id: the same parameters whatever the order of arrival.
        batch = sorted(batch, key=lambda item: item.group_id)
        usable = [index for index, item in enumerate(batch) if item.used]
        graded = [index for index in usable if keeps_all or batch[index].advantages.any()]
        observed = sorted(set(usable) - set(graded))
        planned = [self._plan(batch, chosen) for chosen in (graded, observed)]
        mine = sorted({piece.group for rows in planned for pieces in rows for piece in pieces})
        groups = [batch[index].scored.group for index in mine]
        # Before the prompts are asked for: what it loads of a sample gives both, so no image is opened twice.
        features = self._encode(groups, metrics)
        prompts = {index: self.prompts.prompt(group) for index, group in zip(mine, groups, strict=True)}
        sources = sorted(metrics.sources)
        made = [
            [
                micro_batch(pieces, batch, prompts, version=order.version, sources=sources, layout=self._layout)
                for pieces in rows
            ]
            for rows in planned
        ]
        lengths = [length for item in batch for length in item.shape.lengths]
        total = denominator(loss.kind, sum(lengths), len(lengths), self.config.sampling.max_tokens)
        return Update(made[0], made[1], total, groups, features)

    def _plan(self, batch: Sequence[Example], chosen: Sequence[int]) -> list[list[Piece]]:
        """This rank's micro-batches as pieces of `batch`; none on any rank when nothing is chosen."""
        if not chosen:
            return []
        budget, shared = self.config.optimizer.token_budget, self.config.model.attention != "padded"
        shapes = [batch[index].shape for index in chosen]
        plans = plan(shapes, self.num_ranks, budget, width=self._width, share_prompts=shared)
        return [[Piece(chosen[p.group], p.completions) for p in pieces] for pieces in plans[self.rank]]

    def _encode(self, groups: Sequence[Group], metrics: TrainingMetrics) -> dict[SampleRef, Tensor]:
        """Features of the groups' images by a frozen tower: from the cache, or computed in as many tower calls as the neediest
        rank has. None by a trained one, whose features change with every step."""
        if not self.prompts.is_tower_frozen:
            return {}
        started = time.perf_counter()
        have = self.prompts.at_hand(groups)
        calls = self.prompts.calls(groups, have)
        for index in range(self._most(len(calls))):
            found = self.prompts.encode(calls[index] if index < len(calls) else {})
            have.update(found)
            self.prompts.keep(found)
        metrics.peak("vit_s", time.perf_counter() - started)
        return have

    def _most(self, count: int) -> int:
        """The largest `count` over ranks."""
        if self.num_ranks == 1 or self.family.visual is None:
            return count
        shared = torch.tensor([count])
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return int(shared.item())

    def _accumulate(self, update: Update, order: TrainOrder, metrics: TrainingMetrics) -> None:
        """Gradients of one update into the parameters. Every rank runs the same number of micro-batches."""
        for index, micro in enumerate(update.micro_batches):
            report_step("training", f"micro-batch {index + 1} of {len(update.micro_batches)}")
            is_graded = index < len(update.graded)
            if isinstance(self.policy, FSDPModule):
                # Reduced over ranks once per update, at the last micro-batch that has gradients.
                self.policy.set_requires_gradient_sync(index == len(update.graded) - 1)
            vision = self._vision(micro, update)
            # First, while the policy's forward keeps nothing for its backward yet. A dummy too: the call is collective.
            with torch.no_grad():
                reference = None if self.reference is None else self.reference(micro.inputs, *vision)[0]
            with torch.set_grad_enabled(is_graded):
                logprobs, entropy = self.policy(micro.inputs, *vision)
                prox = logprobs.detach() if update.prox is None else update.prox[index]
                loss = self._loss(micro, logprobs, entropy, prox, reference, update, order, metrics)
                if is_graded:
                    # FSDP averages over ranks; the denominator is global already.
                    torch.autograd.backward(loss * self.num_ranks)

    def _vision(self, micro: MicroBatch, update: Update) -> Vision:
        """What a policy's forward takes for the images of `micro`, the same for the trained policy and for the reference.

        A frozen tower is the same in both, so its features are. A trained one encodes pixels anew in each policy, also when
        `micro` is a dummy or text only: the other ranks' towers wait for this rank's.
        """
        groups = [group for item in micro.examples if self.prompts.has_images(group := item.scored.group)]
        if self.prompts.is_tower_frozen:
            rows = [update.features[group.lease.sample] for group in groups]
            return (torch.cat(rows) if rows else None), None
        if self.family.visual is None:
            return None, None
        images = [self.prompts.images(group) for group in groups] or [self.prompts.blank()]
        return None, joined(images, self._layout.device)

    def _loss(
        self,
        micro: MicroBatch,
        logprobs: Tensor,
        entropy: Tensor,
        prox: Tensor,
        reference: Tensor | None,
        update: Update,
        order: TrainOrder,
        metrics: TrainingMetrics,
    ) -> Tensor:
        if not micro.examples:
            return 0.0 * (logprobs.sum() + entropy.sum())
        section, correction = self.config.loss, order.correction
        tokens = micro.tokens(logprobs, prox, trust_own=correction in ("none", "decoupled"))
        surrogate = LOSSES[section.kind](tokens, old_logprobs(correction, tokens), self._clip)
        cap = section.correction_cap or CAPS[correction]
        weight = correction_weight(correction, tokens, cap)
        loss = weight * surrogate.loss
        if section.entropy_weight:
            loss = loss - section.entropy_weight * entropy
        if reference is not None:
            penalty = kl_penalty(section.kl, logprobs, reference)
            metrics.add("kl/reference", float(penalty.detach().sum()))
            loss = loss + section.kl_weight * penalty
        total = loss.sum() / max(update.denominator, 1)
        metrics.add("loss", float(total.detach()))
        metrics.observe(micro, surrogate, weight, prox, entropy.detach(), cap, self.config.optimizer.token_budget)
        return total

    def _free_gathered(self) -> None:
        """Drop FSDP's gathered copies of the root units, which a forward-only pass leaves behind: stale after the step."""
        for policy in [self.policy] if self.reference is None else [self.policy, self.reference]:
            if isinstance(policy, FSDPModule):
                policy.reshard()


def _staleness_metrics(examples: Sequence[Example], staleness: Sequence[int]) -> dict[str, float]:
    """All and per source, from the staleness of every used trajectory of `examples` in turn."""
    by_source: dict[str, list[int]] = defaultdict(list)
    sources = [item.scored.source for item in examples for _ in item.used]
    for name, age in zip(sources, staleness, strict=True):
        by_source[name].append(age)
    result = {f"source/{name}/staleness/mean": float(np.mean(ages)) for name, ages in by_source.items()}
    if staleness:
        result["staleness/max"] = float(max(staleness))
        result["staleness/mean"] = float(np.mean(staleness))
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

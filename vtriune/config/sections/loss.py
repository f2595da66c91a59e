"""`loss`: what an update minimises. The formulas stand in `learner.losses`."""

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta

from vtriune.config.sections.section import Section, Weight


class Loss(Section, frozen=True):
    """Surrogate, clips, corrections for off-policy data, penalties."""

    kind: Literal["grpo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """grpo: mean over all tokens of an update (arXiv 2402.03300, 2503.14476), the paper's. dr_grpo: no division by length or by the
    standard deviation (2503.20783). gspo: ratio of the whole completion (2507.18071). cispo: clipped weight, kept gradient
    (2506.13585)."""
    clip_low: Annotated[float, Meta(gt=0, le=1)] = 0.2
    """The ratio of new to old probability is clipped from below at 1 - clip_low. The paper's; gspo wants about 3e-4."""
    clip_high: Annotated[float, Meta(gt=0, le=100)] = 0.28
    """Clipped from above at 1 + clip_high; above clip_low, so that unlikely tokens can gain. The paper's; gspo wants about 4e-4."""
    dual_clip: Annotated[float, Meta(gt=1, le=1000)] | None = None
    """c of the dual clip (arXiv 1912.09729): bounds the loss under a negative advantage at c times it. 3 is usual; cispo has none."""
    correction: Literal["auto", "none", "decoupled", "tis", "icepop"] = "auto"
    """Weight for what sampler and learner disagree on. decoupled: per token, cut at the cap (arXiv 2505.24298). tis: per completion.
    icepop: per token, 0 outside of [0.5, cap]. auto: decoupled off-policy; none on-policy, and at a bound of 0 with one update a
    batch, which is on-policy."""
    correction_cap: Annotated[float, Meta(gt=0, le=1000)] | None = None
    """Largest weight of a correction. null: 2 for decoupled, 5 for tis and icepop."""
    kl: Literal["none", "k1", "mse", "k3"] = "none"
    """Estimator of the KL divergence from the initial model, which the learner then holds a second time. The paper trains without."""
    kl_weight: Weight = 0.0
    """Of the KL term; set it and `kl`, or neither."""
    entropy_weight: Weight = 0.0
    """Of an entropy bonus; the paper has none."""

    def problems(self) -> Iterable[str]:
        if (self.kl == "none") != (self.kl_weight == 0):
            yield f"loss: kl {self.kl} with kl_weight {self.kl_weight}; set both or neither"
        if self.kind == "cispo" and self.dual_clip is not None:
            yield f"loss.dual_clip: {self.dual_clip} with kind cispo, which has none; leave it out"
        if self.correction == "none" and self.correction_cap is not None:
            yield f"loss.correction_cap: {self.correction_cap} with correction none, which weighs nothing; leave it out"
        if self.correction == "icepop" and self.correction_cap is not None and self.correction_cap <= 0.5:
            yield f"loss.correction_cap: {self.correction_cap} with correction icepop leaves nothing in [0.5, cap]; raise it"

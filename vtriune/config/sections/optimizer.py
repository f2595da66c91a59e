"""`optimizer`: AdamW and the size of its micro-batches."""

from typing import Annotated, Literal

from msgspec import Meta

from vtriune.config.sections.section import Count, Rate, Section, ShareOrZero

Beta = Annotated[float, Meta(ge=0, lt=1)]


class Optimizer(Section, frozen=True):
    """Rates, their course, clipping."""

    lr: Rate = 1e-6
    """Learning rate at its full height. In the paper 1e-6 was best on-policy; off-policy with 8 updates a batch it took 5e-7."""
    lr_vit: Rate | None = None
    """Rate of the ViT; null: `lr`."""
    lr_connector: Rate | None = None
    """Rate of the connector between ViT and language model; null: `lr`."""
    lr_llm: Rate | None = None
    """Rate of the language model; null: `lr`."""
    warmup: ShareOrZero = 0.05
    """Share of the run's progress over which the rate rises linearly; the first update's is above 0. The paper's."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Course of the rate after the warm-up: constant as in the paper, or falling to almost 0 at the last update."""
    weight_decay: ShareOrZero = 0.01
    """AdamW's decoupled decay, on matrices only: norms and biases have no scale to shrink. The paper's."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates of the gradient's mean and of its square."""
    clip_norm: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    """Largest norm of an update's gradient: a longer one is scaled down, one that is not finite skips the update. The paper's."""
    token_budget: Count = 16384
    """Tokens of a packed micro-batch on each rank, shared prompts counted once. Bounds the learner's memory, changes no gradient."""

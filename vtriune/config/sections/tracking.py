"""`tracking`: what of a run is shown, and where."""

from typing import Literal

from vtriune.config.sections.section import Section, Text


class Tracking(Section, frozen=True):
    """Weights & Biases and the terminal; `metrics.jsonl` is written in any case."""

    wandb: Literal["offline", "online", "off"] = "offline"
    """offline: a Weights & Biases run in the run folder, to be sent by `wandb sync`; needs no account. online: sent as it goes."""
    project: Text = "vtriune"
    """Project at Weights & Biases."""
    console: Literal["auto", "rich", "plain"] = "auto"
    """rich: a live panel. plain: one line per version. auto: rich on a terminal, plain elsewhere."""

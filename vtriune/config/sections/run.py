"""`run`: name, place, randomness and length."""

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta

from vtriune.config.sections.section import Count, Section, Text

MAX_NAME_BYTES = 200
"""Of the 255 that file systems take: a run that is moved aside, and files beside it, have longer names."""


class Run(Section, frozen=True):
    """What the run is called, where its files go, how long it is."""

    name: Text = "run"
    """Name of the run's own folder, `<run.folder>/<run.name>`, and of the run at Weights & Biases."""
    folder: Text = "runs"
    """Where the folders of runs lie. On a Ray cluster a folder that all nodes share."""
    seed: Annotated[int, Meta(ge=0, le=4_000_000)] = 0
    """Draws the order of samples, prompt-pool sentences and the engines' numbers, which are seeded by 1009 times it, in 32 bits."""
    steps: Count | None = None
    """Length in publishes, that is in rollout batches trained on. Set exactly one of `steps` and `epochs`."""
    epochs: Count | None = None
    """Length in passes over the training data, each of which draws every row once; a batch may reach from one into the next, and the
    last may be short. Groups that are filtered or lost count too, so that such a run may have fewer versions than planned."""

    def problems(self) -> Iterable[str]:
        if (self.steps is None) == (self.epochs is None):
            yield f"run: set exactly one of steps ({self.steps}) and epochs ({self.epochs})"
        if self.name in (".", "..") or {"/", "\0"} & {*self.name} or len(self.name.encode()) > MAX_NAME_BYTES:
            yield f"run.name: {self.name!r} is no folder name of at most {MAX_NAME_BYTES} bytes"

"""`data`: what is trained and evaluated on, and how images and prompts become tokens."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from verifiers.types import Frame
from vtriune.config.sections.mixture import Mixture
from vtriune.config.sections.section import Count, Section, ShareOrZero, Text


class Files(Section, frozen=True):
    """Files, with what their rows do not say; what is said here goes before what a row says."""

    files: list[Text] = msgspec.field(default_factory=list)
    """Names, folders, patterns or addresses, as `data.train` takes them alone."""
    source: Text | None = None
    """Of all rows: the name under which their metrics are kept; null: as rows say, else by the file's name."""
    verifier: Text | None = None
    """Who scores the answers; needed where rows name none."""
    verifier_parm: dict[str, Any] | None = None
    """Parameters of the verifier, such as `det_reward_ratio`; keys that a row gives and this does not are kept."""
    frame: Frame | None = None
    """Frame of gold boxes: short for `verifier_parm.gold_frame`."""
    repeats: Annotated[int, Meta(ge=1, le=1000)] | None = None
    """How often an epoch shows each row; null: as an ending like `_x3` of the file's or its folder's name says, else once."""

    def problems(self) -> Iterable[str]:
        if not self.files:
            yield "data.train, data.test: an entry without files; name some"
        if self.frame is not None and "gold_frame" in (self.verifier_parm or {}):
            yield "data.train, data.test: frame beside verifier_parm.gold_frame; say it once"


class SolveRate(Section, frozen=True):
    """`data.draw: solve_rate`: a row's solve rate is the mean accuracy of its newest group that was trained on, or filtered. A row is
    drawn in every pass over its source while its rate is unknown or within bounds, else with the probability `floor`."""

    lowest: ShareOrZero = 0.05
    """Below it a row is too hard, until another group of it says otherwise."""
    highest: ShareOrZero = 0.95
    """Above it a row is too easy."""
    floor: Annotated[float, Meta(ge=0.01, le=1)] = 0.1
    """That a pass draws a row outside of the bounds. Each draw's probability is in the archive, column `probability`."""

    def problems(self) -> Iterable[str]:
        if self.lowest > self.highest:
            yield f"data.solve_rate: lowest {self.lowest} is above highest {self.highest}"


class Data(Section, frozen=True):
    """Files, image sizes, prompts."""

    train: list[Text | Files] = msgspec.field(default_factory=list)
    """Files to train on, one row per sample: Parquet, JSON lines, CSV, TSV, tar, `datasets` folders (docs/data.md). A name that no file
    has is a glob pattern or a folder, which stand for their files, sorted; or an address such as `s3://…`."""
    test: list[Text | Files] = msgspec.field(default_factory=list)
    """Held-out files for evaluation, in the same form."""
    mixture: Mixture = Mixture()
    draw: Literal["uniform", "solve_rate"] = "uniform"
    """uniform: every row once in a pass. solve_rate: seldom those that are always, or never, answered right; an epoch is still as many
    draws as there are rows."""
    solve_rate: SolveRate = SolveRate()
    store: str = ""
    """Folder for the memory-mapped copies of the data, built on first use and shared between runs; empty: `<run.folder>/stores`."""
    min_pixels: Count = 512 * 512
    """Pixels (width · height) to which a smaller image is enlarged, its proportions kept."""
    max_pixels: Count = 2048 * 2048
    """Pixels to which a larger image is reduced. Image tokens grow with them: one for 28 · 28 pixels in Qwen2.5-VL."""
    max_source_pixels: Annotated[int, Meta(ge=1, le=2**30)] = 2**26
    """Largest picture of a row, in pixels as stored. A larger one is a bad row: it is decoded anew each time it is drawn."""
    max_prompt_tokens: Count = 8192
    """Longest prompt, image tokens included. A longer one is a bad row, never cut short."""
    prompt_pool: bool = True
    """Append drawn sentences that ask for reasoning and a boxed answer to training prompts of mathverify (arXiv 2505.18129, 3.1)."""
    on_bad_row: Literal["refuse", "quarantine"] = "refuse"
    """refuse: a run with a bad row does not start. quarantine: bad rows are set aside in a file and named with a reason."""

    def problems(self) -> Iterable[str]:
        if not self.train:
            yield "data.train: no file named; list the files to train on"
        for entry in (*self.train, *self.test):
            yield from () if isinstance(entry, str) else entry.problems()
        yield from self.solve_rate.problems()
        if self.min_pixels > self.max_pixels:
            yield f"data.min_pixels: {self.min_pixels} is above data.max_pixels ({self.max_pixels})"

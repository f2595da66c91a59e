"""`sampling`: how completions are drawn."""

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta

from vtriune.config.sections.section import MOST, Count, Section, Share


class SamplingSection(Section, frozen=True):
    """Temperature and length of completions."""

    temperature: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    """Of training's completions; the learner divides its logits by it too. Evaluation has its own, see `evaluation.sampling`. vLLM
    would sample at 0.01 whatever is below, and so from another distribution than the learner's."""
    top_p: Share = 1.0
    """Nucleus sampling; must be 1, off: tokens cut from the sampler's distribution would have another probability in the learner."""
    top_k: Annotated[int, Meta(ge=-1, le=MOST)] = -1
    """Sampling from the k likeliest tokens; -1 and 0 are off. As for top_p."""
    max_tokens: Count = 2048
    """Longest completion, in evaluation too. A longer one is cut and scored as it stands."""
    seeded: bool = False
    """Seed each completion from `run.seed`, its group and its place there, held-out ones by their rows, so that a repeated run samples
    alike, as far as docs/architecture.md says under Reproducibility; slower on some engines."""

    def problems(self) -> Iterable[str]:
        if self.top_p != 1.0 or self.top_k not in (-1, 0):
            yield (
                "sampling.top_p / top_k: must be off (1.0 and -1): tokens cut from the sampler's distribution would have "
                "another probability in the learner; for held-out answers write evaluation.top_p / top_k"
            )

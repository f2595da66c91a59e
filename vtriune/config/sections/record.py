"""`record`: what of a run's trajectories is archived, and how much of it stays."""

from typing import Annotated

from msgspec import Meta

from vtriune.config.sections.section import Section


class Record(Section, frozen=True):
    """The archive of trajectories, `rollouts/*.parquet`: up to 5 bytes a token."""

    logprobs: bool = True
    """Archive the sampler's log-probs, two thirds of the bytes. Without them `learner.replay` refuses the run; scoring again and
    reports need none."""
    max_gib: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Most that the archive may take on disk; null: no limit. Beyond it the oldest files are removed, all but the newest version's, and
    `archive/num_removed` counts them. `learner.replay` needs every version from 1 on, and refuses a run that lacks some."""

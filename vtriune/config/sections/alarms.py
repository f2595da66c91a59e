"""`alarms`: what is told of a run that goes on all the same, and what ends it."""

from typing import Annotated, Literal

from msgspec import Meta

from vtriune.config.sections.section import Count, Section, ShareOrZero

Action = Literal["log", "stop"]

MAX_WINDOW = 10_000
"""Groups that are looked at together, at most."""


class EmptyBatches(Section, frozen=True):
    """Versions that taught nothing: an empty batch, rewards that are equal in every group, or no update made."""

    versions: Count = 2
    """Rings after this many in a row."""
    action: Action = "log"
    """As `alarms.lost_share.action`."""


class LostShare(Section, frozen=True):
    """Groups lost for good: each failed several times for a reason of ours, whichever generator took it."""

    share: ShareOrZero = 0.05
    """Rings when more than this share of `window` groups, drawn one after the other, is lost; 0: at the first one."""
    window: Annotated[int, Meta(ge=1, le=MAX_WINDOW)] = 200
    """Groups that are looked at together. With 200 and a share of 0.05 the 11th lost group among 200 rings."""
    action: Action = "stop"
    """log: one line on the terminal and in the log, with an example. stop: the same, and the run ends after the version in hand, with a
    checkpoint and exit code 3; the same command resumes it."""


class ZeroAccuracy(Section, frozen=True):
    """Versions, or evaluations, in which no response had an accuracy above 0."""

    versions: Count = 2
    """Rings after this many in a row. Versions and evaluations are counted apart."""
    action: Action = "log"
    """As `alarms.lost_share.action`."""


class Alarms(Section, frozen=True):
    """What is wrong with a run that goes on all the same. An alarm rings once, and again only after it was over."""

    empty_batches: EmptyBatches = EmptyBatches()
    lost_share: LostShare = LostShare()
    zero_accuracy: ZeroAccuracy = ZeroAccuracy()

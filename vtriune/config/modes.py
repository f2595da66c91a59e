"""Which modes a run can be in, what their bound is, and what no mode may be paired with. Everything that asks about modes asks here.

A mode comes from the file (`policy.mode`), from a phase of `policy.schedule`, or from a live switch. `check` and `resolve` look at
all that the file can bring about; the controller looks at each live switch.
"""

from collections.abc import Iterable
from typing import NamedTuple

from vtriune.config.tree import Config, Mode, Policy

DEFAULT_MAX_STALENESS = 2


class Choice(NamedTuple):
    """A mode and how it was asked for; `prefix` stands before its keys in messages: `policy.`, `policy.schedule[1].`, or nothing."""

    prefix: str
    mode: Mode
    max_staleness: int


def bound_of(mode: Mode, asked: int | None) -> int:
    """The hard bound: as asked for; else 0 on-policy and 2 off-policy."""
    if asked is not None:
        return asked
    return 0 if mode == "on_policy" else DEFAULT_MAX_STALENESS


def choices(policy: Policy) -> list[Choice]:
    """Every mode that the file brings about, in order: one for each phase of the schedule if there is one, else `policy.mode`."""
    if not policy.schedule:
        return [Choice("policy.", policy.mode, bound_of(policy.mode, policy.max_staleness))]
    return [
        Choice(f"policy.schedule[{index}].", phase.mode, bound_of(phase.mode, phase.max_staleness))
        for index, phase in enumerate(policy.schedule)
    ]


def is_ever_off_policy(policy: Policy) -> bool:
    """Whether generators and learner are to work at the same time at any point of the run."""
    return any(choice.mode == "off_policy" for choice in choices(policy))


def problems(config: Config, choice: Choice) -> Iterable[str]:
    """What keeps `config` from being run in that mode, one sentence each."""
    prefix, mode, max_staleness = choice
    if mode == "on_policy" and max_staleness > 0:
        yield (
            f"{prefix}max_staleness: {max_staleness} with mode on_policy; on-policy data is never stale: "
            "set it to 0 or write mode: off_policy"
        )
    if mode == "off_policy" and config.policy.in_flight == "continue" and "vit" not in config.model.freeze:
        yield (
            f"{prefix}mode: off_policy with policy.in_flight continue keeps image features of an older ViT; freeze vit, or "
            "choose recompute or drain"
        )

"""Alarms: figures that say that a run is wrong though it goes on. One table, one entry each. Pure; used by `vtriune.run.alarm_bell`.

An alarm is a function of the figures it is shown, one after the other: the lines of `metrics.jsonl`, and between them the number of
groups lost. It rings when its condition begins to hold, and again only after the condition was over. Shown the lines of before, a
resumed run's alarms stand where the uninterrupted run's do; but one that ends a run (`stop`) rings anew if it holds after the resume.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vtriune.config.sections.alarms import Action, Alarms
from vtriune.messages import Purpose

Figures = Mapping[str, float]
Condition = Callable[[Figures], bool | None]
"""Whether something is the case; None: these figures do not say, which changes nothing."""

NUM_LOST = "num_lost_lately"
"""Figure at a loss: how many of `alarms.lost_share.window` groups drawn one after the other are lost."""


@dataclass
class Alarm:
    """An entry of the table."""

    name: str
    """Its section under `alarms`."""
    action: Action
    text: str
    """What is wrong, as a sentence."""
    holds: Condition
    example: Purpose | None = None
    """Whose responses show it."""
    is_ringing: bool = False


def table(section: Alarms) -> list[Alarm]:
    """Every alarm there is."""
    empty, lost, zero = section.empty_batches, section.lost_share, section.zero_accuracy
    return [
        Alarm(
            "empty_batches",
            empty.action,
            f"nothing was learned in {_last(empty.versions, 'version')}: no group had rewards that differ, or no update was made",
            in_a_row(empty.versions, _taught_nothing),
            "train",
        ),
        Alarm(
            "zero_accuracy",
            zero.action,
            f"no response had an accuracy above 0 in {_last(zero.versions, 'version')}",
            in_a_row(zero.versions, _all_zero("reward/accuracy")),
            "train",
        ),
        Alarm(
            "zero_accuracy",
            zero.action,
            f"no held-out response had an accuracy above 0 in {_last(zero.versions, 'evaluation')}",
            in_a_row(zero.versions, _all_zero("eval/sampled/reward/accuracy", "eval/greedy/reward/accuracy")),
            "evaluate",
        ),
        Alarm(
            "lost_share",
            lost.action,
            f"more than {lost.share:.1%} of {lost.window} groups drawn one after the other were lost",
            lambda figures: figures[NUM_LOST] > lost.share * lost.window if NUM_LOST in figures else None,
        ),
    ]


class AlarmTable:
    """The alarms of one run and where each stands."""

    def __init__(self, section: Alarms) -> None:
        self._alarms = table(section)

    def take(self, figures: Figures) -> list[Alarm]:
        """The alarms that begin to ring with these figures."""
        begun = []
        for alarm in self._alarms:
            if (holds := alarm.holds(figures)) is not None:
                if holds and not alarm.is_ringing:
                    begun.append(alarm)
                alarm.is_ringing = holds
        return begun

    def recall(self, history: Iterable[Figures]) -> None:
        """The figures of before a resume: nobody is told again."""
        for figures in history:
            self.take(figures)
        for alarm in self._alarms:
            alarm.is_ringing &= alarm.action == "log"


def in_a_row(num: int, is_so: Condition) -> Condition:
    """Holds from the `num`-th time on that `is_so` was the case without a time between at which it was not."""
    count = 0

    def holds(figures: Figures) -> bool | None:
        nonlocal count
        found = is_so(figures)
        if found is None:
            return None
        count = count + 1 if found else 0
        return count >= num

    return holds


def _taught_nothing(line: Figures) -> bool | None:
    """The batch was empty; or all its advantages 0; or no step of the optimiser was made, as when every gradient is not finite."""
    if "batch/groups" not in line:
        return None
    return line["batch/groups"] == 0 or line.get("updates/done") == 0 or line.get("group/zero_variance") == 1


def _all_zero(*keys: str) -> Condition:
    """Whether every one of `keys` that a line has is 0. Accuracies lie in [0, 1]: their mean is 0 when all are."""

    def is_zero(line: Figures) -> bool | None:
        accuracies = [line[key] for key in keys if key in line]
        return not any(accuracies) if accuracies else None

    return is_zero


def _last(num: int, what: str) -> str:
    return f"the last {what}" if num == 1 else f"the last {num} {what}s"

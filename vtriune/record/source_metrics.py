"""Source-level metrics: what each data source's responses earned, how long they were, whether they reflect, how groups vary.

Pure functions. The recorder turns a group into `GroupStats` as it arrives and forgets its text; `source_metrics` over the groups of
a step gives flat `metrics.jsonl` keys, over all sources without prefix and per source under `source/<data_source>/`.

    reward/mean  reward/accuracy  reward/format  component/<name>     means over responses whose verdict is not `fault`
    correct/rate                                                      `verifiers.is_correct`, by rewards.correct_threshold
    length/mean|correct|incorrect   truncation/rate|correct|incorrect tokens; share that ended at the length limit
    reflection/ratio  reflection/correct_with|correct_without         share with a reflection word; correctness in either part
    reflection/word/<word>                                            occurrences per response, whole words
    verdict/ok|bad_answer|fault  verdict/num_faults                   shares and count over all responses
    group/zero_variance  group/all_right|all_wrong                    shares of groups whose rewards are all equal
    entropy/sampled                                                   -log π_b per token: an estimate of the sampler's entropy, nats
    staleness/mean|max                                                versions, where the consumer's version is given
    batch/share  batch/num_groups  batch/num_responses

A key whose mean would be over nothing is left out: a JSON line holds no NaN.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec
import numpy as np

from verifiers import RewardOptions, Verdict, is_correct
from vtriune.messages import ScoredGroup

REFLECTION_WORDS = (
    "re-check",
    "re-evaluate",
    "re-examine",
    "re-think",
    "recheck",
    "reevaluate",
    "reexamine",
    "reevaluation",
    "rethink",
    "check again",
    "think again",
    "try again",
    "verify",
    "wait",
    "yet",
)

_STEMS = ("re-", "rec", "ree", "ret", "again", "verify", "wait", "yet")
"""Each entry holds one of them, and few texts hold many."""
_TOLERANCE = 1e-6


class ResponseStats(msgspec.Struct, frozen=True):
    """What the metrics need of one response."""

    verdict: Verdict
    is_correct: bool
    num_tokens: int
    is_truncated: bool
    sum_logprob: float
    oldest_version: int
    reflections: dict[str, int]
    """occurrences by word; only words that occur"""


class GroupStats(msgspec.Struct, frozen=True):
    """What the metrics need of one scored group: no text, no ids."""

    source: str
    responses: list[ResponseStats]


def summarise(group: ScoredGroup, options: RewardOptions) -> GroupStats:
    """The figures of one group, correct by the run's `options`; everything else of it can be forgotten."""
    spec = group.group.lease.header.reward
    responses = [
        ResponseStats(
            verdict=verdict,
            is_correct=is_correct(verdict, spec, options=options),
            num_tokens=len(trajectory.token_ids),
            is_truncated=trajectory.finish_reason == "length",
            sum_logprob=float(trajectory.logprobs.sum(dtype=np.float64)),
            oldest_version=trajectory.oldest_version,
            reflections=reflection_counts(trajectory.text),
        )
        for trajectory, verdict in zip(group.group.trajectories, group.verdicts, strict=True)
    ]
    return GroupStats(group.source, responses)


def reflection_counts(text: str) -> dict[str, int]:
    """Occurrences of each reflection word in `text`, as whole words, in any case; words that do not occur are absent."""
    lowered = text.lower()
    # Letters in a row are found ten times as fast as words: only entries that may occur are matched.
    stems = tuple(stem for stem in _STEMS if stem in lowered)
    if not stems:
        return {}
    return dict(Counter(" ".join(found.split()) for found in _pattern(stems).findall(lowered)))


@functools.cache
def _pattern(stems: tuple[str, ...]) -> re.Pattern[str]:
    """Any entry that holds one of `stems`, as whole words. What stands before is looked at behind the first letter: a pattern that
    begins with letters is found faster."""
    entries = [entry for entry in REFLECTION_WORDS if any(stem in entry for stem in stems)]
    behind = "|".join(rf"{entry[0]}(?<!\w{entry[0]}){entry[1:]}" for entry in entries)
    return re.compile(rf"(?:{behind})(?!\w)".replace(" ", r"\s+"))


def source_metrics(groups: Iterable[GroupStats], *, version: int | None = None) -> dict[str, float]:
    """Every metric of the module docstring, over all groups and per source.

    version  the learner's while it consumed these groups; None leaves staleness out
    """
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for group in groups:
        tallies[group.source].add(group)
    whole = _Tally()
    for tally in tallies.values():
        whole.merge(tally)
    metrics = whole.metrics(version)
    for source, tally in sorted(tallies.items()):
        share = tally.num_groups / whole.num_groups
        metrics[f"source/{source}/batch/share"] = share
        metrics |= {f"source/{source}/{key}": value for key, value in tally.metrics(version).items()}
    return metrics


_EVALUATION_KEYS = (
    "reward/mean",
    "reward/accuracy",
    "reward/format",
    "correct/rate",
    "length/mean",
    "truncation/rate",
    "verdict/num_faults",
    "batch/num_responses",
)


def evaluation_metrics(groups: Iterable[GroupStats], *, prefix: str = "eval") -> dict[str, float]:
    """`eval/reward/mean`, `eval/source/<data_source>/reward/mean` and the like: rewards, correctness, length, truncation, faults,
    and every component."""
    groups = list(groups)
    metrics = source_metrics(groups)
    # Not split at its slashes: a source may be called `owner/set`.
    scopes = {f"source/{group.source}/" for group in groups}

    def is_wanted(key: str) -> bool:
        bare = [key[len(scope) :] for scope in scopes if key.startswith(scope)] or [key]
        return any(name in _EVALUATION_KEYS or name.startswith("component/") for name in bare)

    return {f"{prefix}/{key}": value for key, value in metrics.items() if is_wanted(key)}


class _Tally:
    """Every value that a mean is taken of, over the groups of one source; tallies of several sources merge into one."""

    def __init__(self) -> None:
        self.num_groups = 0
        self.words: Counter[str] = Counter()
        self.values: dict[str, list[float]] = defaultdict(list)
        """By key; those of `logprob` (of whole responses) and `version` (the oldest of each) are no key of their own."""

    def add(self, group: GroupStats) -> None:
        self.num_groups += 1
        for response in group.responses:
            self._add_response(response)
        judged = [response for response in group.responses if response.verdict.status != "fault"]
        if len(judged) > 1:
            rewards = [response.verdict.reward for response in judged]
            is_flat = max(rewards) - min(rewards) <= _TOLERANCE
            is_right = all(response.is_correct for response in judged)
            self.values["group/zero_variance"].append(is_flat)
            self.values["group/all_right"].append(is_flat and is_right)
            self.values["group/all_wrong"].append(is_flat and not is_right)

    def _add_response(self, response: ResponseStats) -> None:
        verdict, is_reflecting = response.verdict, bool(response.reflections)
        self.words.update(response.reflections)
        values: dict[str, float] = {
            "version": response.oldest_version,
            "logprob": response.sum_logprob,
            "length/mean": response.num_tokens,
            "truncation/rate": response.is_truncated,
            "reflection/ratio": is_reflecting,
            **{f"verdict/{status}": verdict.status == status for status in ("ok", "bad_answer", "fault")},
        }
        if verdict.status != "fault":
            part = "correct" if response.is_correct else "incorrect"
            values |= {
                "reward/mean": verdict.reward,
                "reward/accuracy": verdict.accuracy,
                "reward/format": verdict.format,
                "correct/rate": response.is_correct,
                f"length/{part}": response.num_tokens,
                f"truncation/{part}": response.is_truncated,
                f"reflection/correct_{'with' if is_reflecting else 'without'}": response.is_correct,
                **{f"component/{name}": value for name, value in verdict.components.items()},
            }
        for key, value in values.items():
            self.values[key].append(value)

    def merge(self, other: "_Tally") -> None:
        self.num_groups += other.num_groups
        self.words.update(other.words)
        for key, values in other.values.items():
            self.values[key] += values

    def metrics(self, version: int | None) -> dict[str, float]:
        """Flat keys of this tally; empty for no group."""
        if not self.num_groups:
            return {}
        metrics = {key: sum(values) / len(values) for key, values in self.values.items()}
        del metrics["logprob"]
        mean_version, num_responses = metrics.pop("version"), len(self.values["version"])
        for word in REFLECTION_WORDS:
            metrics[f"reflection/word/{word.replace(' ', '_')}"] = self.words[word] / num_responses
        metrics["verdict/num_faults"] = float(sum(self.values["verdict/fault"]))
        metrics["batch/num_groups"] = float(self.num_groups)
        metrics["batch/num_responses"] = float(num_responses)
        if num_tokens := sum(self.values["length/mean"]):
            metrics["entropy/sampled"] = -sum(self.values["logprob"]) / num_tokens
        if version is not None:
            metrics["staleness/mean"] = version - mean_version
            metrics["staleness/max"] = float(version - min(self.values["version"]))
        return metrics

"""Source-level metrics: what each data source's responses earned, how long they were, whether they reflect, how groups vary.

Pure functions. The recorder turns a group into `GroupStats` as it arrives and forgets its text; `source_metrics` over the groups of
a step gives flat `metrics.jsonl` keys, over all sources without prefix and per source under `source/<data_source>/`.

    reward/mean  reward/accuracy  reward/format  component/<name>     means over responses whose verdict is not `fault`
    correct/rate                                                      accuracy ≥ 1 - 1e-6; detection: its component's threshold
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

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from verifiers import Verdict
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

# One word of each entry above: a text without any of them needs no matching.
_HEADS = ("re-", "recheck", "reeva", "reexa", "rethink", "again", "verify", "wait", "yet")
_REFLECTION = re.compile(
    r"(?<!\w)(?:re(?:-?(?:check|evaluate|examine|think)|evaluation)|(?:check|think|try)\s+again|verify|wait|yet)(?!\w)"
)
_TOLERANCE = 1e-6


class CorrectRule(msgspec.Struct, frozen=True):
    """When a response counts as correct: by its accuracy, or by `component` where its verdict has that one (detection)."""

    component: str = "label_first_iou@50"
    threshold: float = 0.5

    def is_correct(self, verdict: Verdict) -> bool:
        """A fault is never correct."""
        if verdict.status == "fault":
            return False
        value = verdict.components.get(self.component)
        return verdict.accuracy >= 1 - _TOLERANCE if value is None else value >= self.threshold


BY_ACCURACY_OR_IOU = CorrectRule()


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


def summarise(group: ScoredGroup, rule: CorrectRule = BY_ACCURACY_OR_IOU) -> GroupStats:
    """The figures of one group; everything else of it can be forgotten."""
    responses = [
        ResponseStats(
            verdict=verdict,
            is_correct=rule.is_correct(verdict),
            num_tokens=len(trajectory.token_ids),
            is_truncated=trajectory.finish_reason == "length",
            sum_logprob=float(trajectory.logprobs.sum()),
            oldest_version=trajectory.oldest_version,
            reflections=reflection_counts(trajectory.text),
        )
        for trajectory, verdict in zip(group.group.trajectories, group.verdicts, strict=True)
    ]
    return GroupStats(group.source, responses)


def reflection_counts(text: str) -> dict[str, int]:
    """Occurrences of each reflection word in `text`, as whole words, in any case; words that do not occur are absent."""
    lowered = text.lower()
    if not any(head in lowered for head in _HEADS):
        return {}
    return dict(Counter(" ".join(found.split()) for found in _REFLECTION.findall(lowered)))


def source_metrics(
    groups: Iterable[ScoredGroup | GroupStats], *, version: int | None = None, rule: CorrectRule = BY_ACCURACY_OR_IOU
) -> dict[str, float]:
    """Every metric of the module docstring, over all groups and per source.

    version  the learner's while it consumed these groups; None leaves staleness out
    """
    tallies = _tally(groups, rule)
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


def evaluation_metrics(
    groups: Iterable[ScoredGroup | GroupStats], *, prefix: str = "eval", rule: CorrectRule = BY_ACCURACY_OR_IOU
) -> dict[str, float]:
    """`eval/reward/mean`, `eval/source/<data_source>/reward/mean` and the like: rewards, correctness, length, truncation, faults,
    and every component."""
    metrics = source_metrics(groups, rule=rule)

    def is_wanted(key: str) -> bool:
        bare = key.split("/", 2)[2] if key.startswith("source/") else key
        return bare in _EVALUATION_KEYS or bare.startswith("component/")

    return {f"{prefix}/{key}": value for key, value in metrics.items() if is_wanted(key)}


def _tally(groups: Iterable[ScoredGroup | GroupStats], rule: CorrectRule) -> "dict[str, _Tally]":
    tallies: dict[str, _Tally] = defaultdict(_Tally)
    for group in groups:
        stats = group if isinstance(group, GroupStats) else summarise(group, rule)
        tallies[stats.source].add(stats)
    return tallies


@dataclass(slots=True)
class _Mean:
    """A sum and how many values it is of."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    def merge(self, other: "_Mean") -> None:
        self.total += other.total
        self.count += other.count


@dataclass(slots=True)
class _Tally:
    """Sums over the groups of one source; tallies of several sources merge into one."""

    means: dict[str, _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    words: Counter[str] = field(default_factory=Counter)
    num_groups: int = 0
    num_faults: int = 0
    num_responses: int = 0
    num_tokens: int = 0
    sum_logprob: float = 0.0
    oldest_version: int | None = None

    def add(self, group: GroupStats) -> None:
        self.num_groups += 1
        for response in group.responses:
            self._add_response(response)
        judged = [response for response in group.responses if response.verdict.status != "fault"]
        if len(judged) > 1:
            rewards = [response.verdict.reward for response in judged]
            is_flat = max(rewards) - min(rewards) <= _TOLERANCE
            is_right = all(response.is_correct for response in judged)
            self.means["group/zero_variance"].add(is_flat)
            self.means["group/all_right"].add(is_flat and is_right)
            self.means["group/all_wrong"].add(is_flat and not is_right)

    def _add_response(self, response: ResponseStats) -> None:
        means, verdict = self.means, response.verdict
        self.num_responses += 1
        self.num_tokens += response.num_tokens
        self.sum_logprob += response.sum_logprob
        if self.oldest_version is None or response.oldest_version < self.oldest_version:
            self.oldest_version = response.oldest_version
        means["staleness"].add(response.oldest_version)
        means["length/mean"].add(response.num_tokens)
        means["truncation/rate"].add(response.is_truncated)
        means["reflection/ratio"].add(bool(response.reflections))
        self.words.update(response.reflections)
        for status in ("ok", "bad_answer", "fault"):
            means[f"verdict/{status}"].add(verdict.status == status)
        if verdict.status == "fault":
            self.num_faults += 1
            return
        means["reward/mean"].add(verdict.reward)
        means["reward/accuracy"].add(verdict.accuracy)
        means["reward/format"].add(verdict.format)
        means["correct/rate"].add(response.is_correct)
        part = "correct" if response.is_correct else "incorrect"
        means[f"length/{part}"].add(response.num_tokens)
        means[f"truncation/{part}"].add(response.is_truncated)
        means[f"reflection/correct_{'with' if response.reflections else 'without'}"].add(response.is_correct)
        for name, value in verdict.components.items():
            means[f"component/{name}"].add(value)

    def merge(self, other: "_Tally") -> None:
        for name, mean in other.means.items():
            self.means[name].merge(mean)
        self.words.update(other.words)
        self.num_groups += other.num_groups
        self.num_faults += other.num_faults
        self.num_responses += other.num_responses
        self.num_tokens += other.num_tokens
        self.sum_logprob += other.sum_logprob
        known = [oldest for oldest in (self.oldest_version, other.oldest_version) if oldest is not None]
        self.oldest_version = min(known, default=None)

    def metrics(self, version: int | None) -> dict[str, float]:
        """Flat keys of this tally; empty for no group."""
        if not self.num_groups:
            return {}
        metrics = {name: mean.total / mean.count for name, mean in self.means.items() if name != "staleness"}
        for word in REFLECTION_WORDS:
            metrics[f"reflection/word/{word.replace(' ', '_')}"] = self.words[word] / max(1, self.num_responses)
        metrics["verdict/num_faults"] = float(self.num_faults)
        metrics["batch/num_groups"] = float(self.num_groups)
        metrics["batch/num_responses"] = float(self.num_responses)
        if self.num_tokens:
            metrics["entropy/sampled"] = -self.sum_logprob / self.num_tokens
        if version is not None and self.oldest_version is not None:
            staleness = self.means["staleness"]
            metrics["staleness/mean"] = version - staleness.total / staleness.count
            metrics["staleness/max"] = float(version - self.oldest_version)
        return metrics

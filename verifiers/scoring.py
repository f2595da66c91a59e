"""The front of the library: one response or many, scored by whatever verifier each row names.

Scores go through one path, whoever calls: the pool, the checks at data load, the offline rescorer. Options are a
process-wide default that `configure` sets, or a keyword argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from verifiers.registry import Context, GoldError, Implementation, JudgeError, Outcome, SpecError, Task, find, params_of
from verifiers.tags import tag_format
from verifiers.types import RewardOptions, RewardSpec, Verdict, fault

# Begins the reason of a fault that the data must answer for.
BAD_ROW = "bad row: "
# A gold answer must reach this through the real path.
GOLD_ACCURACY = 1.0 - 1e-6

_process_options = RewardOptions()


def configure(options: RewardOptions) -> None:
    """Make `options` the default of this process."""
    global _process_options
    _process_options = options


def current_options() -> RewardOptions:
    """The default options of this process."""
    return _process_options


def score(
    response: str, spec: RewardSpec, progress: float | None = 1.0, *, options: RewardOptions | None = None
) -> Verdict:
    """The verdict on one response. `progress` in [0, 1] is the share of training done; None means evaluation, with a
    fixed threshold.

    Raises nothing for any response, gold answer or row: what cannot be judged is a `fault` with its reason.
    """
    return score_batch([response], [spec], progress, options=options)[0]


def score_batch(
    responses: Sequence[str],
    specs: Sequence[RewardSpec],
    progress: float | None = 1.0,
    *,
    options: RewardOptions | None = None,
) -> list[Verdict]:
    """Verdicts in the order of the responses; see `score`. ValueError where the two lengths differ.

    Samples of one vectorised verifier are scored in one kernel call. A group may pass the same spec object for each
    completion: its parameters are then read once.
    """
    routed = route(responses, specs, progress, options=options)
    for group in routed.batches.values():
        for index, outcome in zip(group.indices, group.implementation.score_batch(group.tasks), strict=True):
            routed.settle(index, outcome)
    return routed.complete()


class Batch:
    """Tasks of one verifier, with their places in the call."""

    def __init__(self, implementation: Implementation) -> None:
        self.implementation = implementation
        self.indices: list[int] = []
        self.tasks: list[Task] = []


class Routed:
    """A call's responses, sorted by verifier: what is known already, and what is left to score."""

    def __init__(self, responses: Sequence[str], specs: Sequence[RewardSpec], context: Context) -> None:
        self.responses, self.specs, self.context = responses, specs, context
        self.verdicts: list[Verdict | None] = [None] * len(responses)
        self.batches: dict[str, Batch] = {}

    def settle(self, index: int, outcome: Outcome | Exception) -> None:
        """Turn a verifier's outcome into the verdict of response `index`."""
        self.verdicts[index] = to_verdict(self.responses[index], self.specs[index], outcome, self.context.options)

    def complete(self) -> list[Verdict]:
        """All verdicts; RuntimeError where one is missing."""
        done = [verdict for verdict in self.verdicts if verdict is not None]
        if len(done) != len(self.verdicts):
            raise RuntimeError(f"{len(self.verdicts) - len(done)} of {len(self.verdicts)} responses got no verdict")
        return done


def route(
    responses: Sequence[str],
    specs: Sequence[RewardSpec],
    progress: float | None,
    *,
    options: RewardOptions | None = None,
) -> Routed:
    """Sort responses by verifier. Bad rows and overlong responses get their verdict here; nothing else is looked at."""
    if len(responses) != len(specs):
        raise ValueError(f"{len(responses)} responses for {len(specs)} specs")
    chosen = options or _process_options
    context = Context(chosen.for_evaluation(), 1.0) if progress is None else Context(chosen, progress)
    routed = Routed(responses, specs, context)
    read: dict[int, tuple[Implementation, Any] | SpecError] = {}
    for index, (response, spec) in enumerate(zip(responses, specs, strict=True)):
        known = read.get(id(spec))
        if known is None:
            try:
                known = _read(spec)
            except SpecError as error:
                known = error
            read[id(spec)] = known
        if isinstance(known, SpecError):
            routed.settle(index, known)
        elif len(response) > chosen.max_response_chars:
            reason = f"{len(response)} characters; rewards.max_response_chars is {chosen.max_response_chars}"
            routed.settle(index, Outcome(0.0, format=0.0, status="bad_answer", reason=reason))
        else:
            implementation, params = known
            batch = routed.batches.get(spec.verifier)
            if batch is None:
                batch = routed.batches[spec.verifier] = Batch(implementation)
            batch.indices.append(index)
            batch.tasks.append(Task(response, spec.gold, params, context))
    return routed


def _read(spec: RewardSpec) -> tuple[Implementation, Any]:
    if not (
        spec.accuracy_ratio >= 0.0
        and spec.format_ratio >= 0.0
        and 0.0 < spec.accuracy_ratio + spec.format_ratio < 1e300
    ):
        raise SpecError(
            f"accuracy_ratio {spec.accuracy_ratio} and format_ratio {spec.format_ratio} must be ≥ 0 with a positive, finite sum"
        )
    implementation = find(spec.verifier)
    return implementation, params_of(spec, implementation)


def to_verdict(response: str, spec: RewardSpec, outcome: Outcome | Exception, options: RewardOptions) -> Verdict:
    """R = (a·R_acc + f·R_fmt)/(a + f); an exception is a fault."""
    if isinstance(outcome, SpecError | GoldError):
        return fault(f"{BAD_ROW}{outcome}")
    if isinstance(outcome, JudgeError):
        return fault(f"{spec.verifier}: {outcome}")
    if isinstance(outcome, Exception):
        return fault(f"{spec.verifier}: {type(outcome).__name__}: {outcome}")
    accuracy = outcome.accuracy
    form = tag_format(response, options.format) if outcome.format is None else outcome.format
    if not (0.0 <= accuracy <= 1.0 and 0.0 <= form <= 1.0):
        return fault(f"{spec.verifier} returned accuracy {accuracy} and format {form}, outside [0, 1]")
    a, f = spec.accuracy_ratio, spec.format_ratio
    return Verdict(
        outcome.status, (a * accuracy + f * form) / (a + f), accuracy, form, outcome.components, outcome.reason
    )


def validate_spec(spec: RewardSpec, *, options: RewardOptions | None = None) -> str | None:
    """What is wrong with a row's reward set-up, in one sentence, or None: unknown verifier or parameter, weights that
    sum to 0, no gold.

    Scores nothing; `check_gold` does.
    """
    try:
        implementation, params = _read(spec)
        if not spec.gold.strip():
            return "no gold answer: both ground_truth and answer are empty"
        return implementation.check(spec.gold, params, Context(options or _process_options, 1.0))
    except (SpecError, GoldError) as error:
        return str(error)


def check_gold(spec: RewardSpec, *, options: RewardOptions | None = None) -> str | None:
    """None if the gold answer, given in the form a model should give it, scores accuracy 1 through the real path; else
    what it scores.

    Data load and `--dry-run` call it on every row before anything is trained on.
    """
    problem = validate_spec(spec, options=options)
    if problem is not None:
        return problem
    implementation, params = _read(spec)
    context = Context(options or _process_options, 1.0)
    try:
        response = implementation.gold_response(spec.gold, params, context)
    except GoldError as error:
        return str(error)
    verdict = score(response, spec, options=options)
    if verdict.status == "fault":
        return verdict.reason
    if verdict.accuracy < GOLD_ACCURACY:
        return f"the gold answer {spec.gold[:200]!r} scores {verdict.accuracy:g} under {spec.verifier!r}, not 1 ({verdict.reason})"
    return None


def is_correct(verdict: Verdict, spec: RewardSpec, *, options: RewardOptions | None = None) -> bool:
    """Whether an answer counts as correct in the metrics: accuracy ≥ 1 − 1e-6, or for detection the configured
    component's threshold.
    """
    if verdict.status == "fault":
        return False
    chosen = options or _process_options
    if spec.verifier != "detection":
        return verdict.accuracy >= GOLD_ACCURACY
    value = verdict.components.get(chosen.correct_component)
    return verdict.accuracy >= GOLD_ACCURACY if value is None else value >= chosen.correct_threshold


def spec_from_row(reward_model: dict[str, Any]) -> RewardSpec:
    """The spec of a row's `reward_model` struct as Parquet gives it; nulls take the field's default. SpecError where a
    type does not fit.
    """
    try:
        return msgspec.convert({key: value for key, value in reward_model.items() if value is not None}, RewardSpec)
    except msgspec.ValidationError as error:
        raise SpecError(f"reward_model: {error}") from error

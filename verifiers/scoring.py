"""The front of the library: one response or many, scored by whatever verifier each row names.

Scores go through one path, whoever calls: the pool, the checks at data load, the offline rescorer. Options are a
process-wide default that `configure` sets, or a keyword argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from verifiers.registry import Context, GoldError, Implementation, Outcome, SpecError, Task, find, params_of
from verifiers.tags import tag_format
from verifiers.types import RewardOptions, RewardSpec, Verdict, fault

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
    if len(responses) != len(specs):
        raise ValueError(f"{len(responses)} responses for {len(specs)} specs")
    chosen = options or _process_options
    context = Context(chosen, 1.0 if progress is None else progress)
    if progress is None:
        context = Context(chosen.for_evaluation(), 1.0)
    verdicts: list[Verdict | None] = [None] * len(responses)
    tasks: dict[str, tuple[Implementation, list[int], list[Task]]] = {}
    read: dict[int, tuple[Implementation, Any]] = {}
    for index, (response, spec) in enumerate(zip(responses, specs, strict=True)):
        known = read.get(id(spec))
        if known is None:
            try:
                known = read[id(spec)] = _read(spec)
            except SpecError as error:
                verdicts[index] = fault(str(error))
                continue
        if len(response) > chosen.max_response_chars:
            reason = (
                f"a response of {len(response)} characters; rewards.max_response_chars is {chosen.max_response_chars}"
            )
            verdicts[index] = Verdict("bad_answer", 0.0, 0.0, 0.0, {}, reason)
            continue
        implementation, params = known
        _, indices, batch = tasks.setdefault(spec.verifier, (implementation, [], []))
        indices.append(index)
        batch.append(Task(response, spec.gold, params, context))
    for implementation, indices, batch in tasks.values():
        for index, task, outcome in zip(indices, batch, implementation.score_batch(batch), strict=True):
            verdicts[index] = _verdict(task.response, specs[index], outcome, chosen)
    return [verdict for verdict in verdicts if verdict is not None]


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


def _verdict(response: str, spec: RewardSpec, outcome: Outcome | Exception, options: RewardOptions) -> Verdict:
    """R = (a·R_acc + f·R_fmt)/(a + f)."""
    if isinstance(outcome, Exception):
        kind = (
            "bad row"
            if isinstance(outcome, SpecError | GoldError)
            else f"{spec.verifier} raised {type(outcome).__name__}"
        )
        return fault(f"{kind}: {outcome}")
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
    response = implementation.gold_response(spec.gold, params, context)
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

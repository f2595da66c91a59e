"""The front of the library: one response or many, scored by whatever verifier each row names.

Scores go through one path, whoever calls: the pool, the checks at data load, the offline rescorer. Options are a process-wide
default that `configure` sets, or a keyword argument.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from verifiers.registry import Context, GoldError, Implementation, JudgeError, Outcome, SpecError, Task, find, params_of
from verifiers.tags import tag_format
from verifiers.types import ImageSize, RewardOptions, RewardSpec, Verdict, fault

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
    response: str,
    spec: RewardSpec,
    progress: float | None = 1.0,
    *,
    options: RewardOptions | None = None,
    image_sizes: Sequence[ImageSize] = (),
) -> Verdict:
    """The verdict on one response. `progress` in [0, 1] is the share of training done; None means evaluation. `image_sizes`: of the
    prompt's images, which rows need whose frames differ and that name no sizes themselves.

    Raises nothing for any response, gold answer or row: what cannot be judged is a `fault` with its reason.
    """
    return score_batch([response], [spec], progress, options=options, image_sizes=[image_sizes])[0]


def score_batch(
    responses: Sequence[str],
    specs: Sequence[RewardSpec],
    progress: float | None = 1.0,
    *,
    options: RewardOptions | None = None,
    image_sizes: Sequence[Sequence[ImageSize]] | None = None,
) -> list[Verdict]:
    """Verdicts in the order of the responses; see `score`. ValueError where lengths differ.

    Samples of one vectorised verifier are scored in one kernel call. A group may pass the same spec object for each
    completion: its parameters are then read once.
    """
    routed = route(responses, specs, progress, options=options, image_sizes=image_sizes)
    for group in routed.batches.values():
        for index, outcome in zip(group.indices, group.implementation.score_batch(group.tasks), strict=True):
            routed.settle(index, outcome)
    return routed.complete()


class Batch(NamedTuple):
    """Tasks of one verifier, with their places in the call."""

    implementation: Implementation
    indices: list[int]
    tasks: list[Task]


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
    image_sizes: Sequence[Sequence[ImageSize]] | None = None,
) -> Routed:
    """Sort responses by verifier. Bad rows and overlong responses get their verdict here; nothing else is looked at."""
    if len(responses) != len(specs):
        raise ValueError(f"{len(responses)} responses for {len(specs)} specs")
    if image_sizes is not None and len(image_sizes) != len(specs):
        raise ValueError(f"image sizes of {len(image_sizes)} samples for {len(specs)} specs")
    chosen = options or _process_options
    routed = Routed(responses, specs, Context(chosen, progress))
    contexts: dict[tuple[ImageSize, ...], Context] = {(): routed.context}
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
                batch = routed.batches[spec.verifier] = Batch(implementation, [], [])
            batch.indices.append(index)
            sizes = () if image_sizes is None else tuple(image_sizes[index])
            if sizes not in contexts:
                contexts[sizes] = Context(chosen, progress, sizes)
            batch.tasks.append(Task(response, spec.gold, params, contexts[sizes]))
    return routed


def _read(spec: RewardSpec) -> tuple[Implementation, Any]:
    a, f = spec.accuracy_ratio, spec.format_ratio
    if not (a >= 0.0 and f >= 0.0 and 0.0 < a + f < 1e300):
        raise SpecError(f"accuracy_ratio {a} and format_ratio {f} must be ≥ 0 with a positive, finite sum")
    implementation = find(spec.verifier)
    return implementation, params_of(spec, implementation)


def to_verdict(response: str, spec: RewardSpec, outcome: Outcome | Exception, options: RewardOptions) -> Verdict:
    """R = (a·R_acc + f·R_fmt)/(a + f); an exception is a fault."""
    if isinstance(outcome, SpecError | GoldError):
        return fault(f"{BAD_ROW}{outcome}")
    if isinstance(outcome, Exception):
        kind = "" if isinstance(outcome, JudgeError) else f"{type(outcome).__name__}: "
        return fault(f"{spec.verifier}: {kind}{outcome}")
    accuracy = outcome.accuracy
    form = tag_format(response, options.format) if outcome.format is None else outcome.format
    if not (0.0 <= accuracy <= 1.0 and 0.0 <= form <= 1.0):
        return fault(f"{spec.verifier} returned accuracy {accuracy} and format {form}, outside [0, 1]")
    a, f = spec.accuracy_ratio, spec.format_ratio
    reward = (a * accuracy + f * form) / (a + f)
    return Verdict(outcome.status, reward, accuracy, form, outcome.components, outcome.reason)


def validate_spec(
    spec: RewardSpec, *, options: RewardOptions | None = None, image_sizes: Sequence[ImageSize] = ()
) -> str | None:
    """What is wrong with a row's reward set-up, in one sentence, or None. Scores nothing; `check_gold` does."""
    try:
        implementation, params = _read(spec)
        if not spec.gold.strip():
            return "no gold answer: both ground_truth and answer are empty"
        return implementation.check(spec.gold, params, Context(options or _process_options, 1.0, tuple(image_sizes)))
    except (SpecError, GoldError) as error:
        return str(error)


def check_gold(
    spec: RewardSpec, *, options: RewardOptions | None = None, image_sizes: Sequence[ImageSize] = ()
) -> str | None:
    """None if the gold answer, given as a model should give it, scores accuracy 1 through the real path; else what it scores.

    `VerifierPool.check_golds` does the same to many, where none can hang.
    """
    try:
        response = gold_response(spec, options=options, image_sizes=image_sizes)
    except GoldError as error:
        return str(error)
    return gold_problem(spec, score(response, spec, options=options, image_sizes=image_sizes))


def gold_response(
    spec: RewardSpec, *, options: RewardOptions | None = None, image_sizes: Sequence[ImageSize] = ()
) -> str:
    """The gold answer as a model should give it. GoldError for a row whose set-up or gold answer cannot be used."""
    try:
        if (problem := validate_spec(spec, options=options, image_sizes=image_sizes)) is not None:
            raise GoldError(problem)
        implementation, params = _read(spec)
        context = Context(options or _process_options, 1.0, tuple(image_sizes))
        return implementation.gold_response(spec.gold, params, context)
    except GoldError:
        raise
    # A verifier's `check` and `gold_response` may raise anything, which is this row's affair alone.
    except Exception as error:
        raise GoldError(f"{spec.verifier}: {type(error).__name__}: {error}") from error


def gold_problem(spec: RewardSpec, verdict: Verdict) -> str | None:
    """What is wrong with the row, by the verdict on its own gold answer; None where that scores 1."""
    if verdict.status == "fault":
        is_told = verdict.reason.startswith(BAD_ROW)
        return verdict.reason if is_told else f"the gold answer {spec.gold[:200]!r} cannot be judged: {verdict.reason}"
    if verdict.accuracy < GOLD_ACCURACY:
        return f"the gold answer {spec.gold[:200]!r} scores {verdict.accuracy:g} under {spec.verifier!r}, not 1 ({verdict.reason})"
    return None


def is_correct(verdict: Verdict, spec: RewardSpec, *, options: RewardOptions | None = None) -> bool:
    """Whether an answer counts as correct, in metrics and reports; a fault never does.

    By accuracy ≥ 1 − 1e-6; for detection, where there is something to find, by `correct_component` ≥ `correct_threshold`.
    """
    chosen = options or _process_options
    value = verdict.components.get(chosen.correct_component) if spec.verifier == "detection" else None
    return verdict.accuracy >= GOLD_ACCURACY if value is None else value >= chosen.correct_threshold


def spec_from_row(reward_model: dict[str, Any]) -> RewardSpec:
    """The spec of a row's `reward_model`, as Parquet gives it; nulls take the field's default. SpecError for a type that is wrong."""
    try:
        return msgspec.convert({key: value for key, value in reward_model.items() if value is not None}, RewardSpec)
    except msgspec.ValidationError as error:
        raise SpecError(f"reward_model: {error}") from error

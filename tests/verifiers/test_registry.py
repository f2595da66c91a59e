"""Verifiers by name: registering, finding, parameters, and what a verifier may do to the rest."""

import importlib.metadata
import subprocess
import sys

import msgspec
import pytest

from verifiers import (
    Context,
    ImageSize,
    IouStep,
    Outcome,
    RewardOptions,
    RewardSpec,
    SpecError,
    configure,
    current_options,
    known_names,
    registry,
    score,
    score_batch,
    spec_from_row,
    validate_spec,
    verifier,
)
from verifiers.answers import only_number, read_gold
from verifiers.pool.frames import Job, decode, encode
from verifiers.pool.worker import answer
from verifiers.types import OptionsError


class LengthParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    most: int = 10


@verifier("test_length")
def length(response: str, gold: str, params: LengthParams, context: Context) -> Outcome:
    return Outcome(float(len(response) <= params.most), {"length": float(len(response))})


@verifier("test_raises")
def raises(response: str, gold: str, params: registry.NoParams, context: Context) -> Outcome:
    raise RuntimeError("broken")


@verifier("test_number")
def number(response: str, gold: str, params: registry.NoParams, context: Context) -> Outcome:
    return Outcome(float(only_number(response) == read_gold(only_number, gold, "number")))


@verifier("test_beyond_one")
def beyond_one(response: str, gold: str, params: registry.NoParams, context: Context) -> Outcome:
    return Outcome(float("nan") if response else 2.0)


@verifier("test_sizes")
def sizes(response: str, gold: str, params: registry.NoParams, context: Context) -> Outcome:
    return Outcome(1.0, {"width": float(sum(size.resized[0] for size in context.image_sizes))})


def test_a_verifier_is_told_the_sizes_of_its_prompts_images_in_process_and_in_a_worker() -> None:
    specs = [RewardSpec(ground_truth="x", verifier="test_sizes")] * 3
    given = [[ImageSize((9, 9), (28, 56))], [ImageSize((9, 9), (28, 56)), ImageSize((8, 8), (84, 56))], []]
    widths = [verdict.components["width"] for verdict in score_batch(["a"] * 3, specs, image_sizes=given)]
    assert widths == [28.0, 112.0, 0.0]
    received = decode(encode(Job(1, "a", specs[0], 1.0, tuple(given[1])))[4:], Job)
    outcome = answer(received, RewardOptions()).outcome
    assert outcome is not None
    assert outcome.components == {"width": 112.0}
    with pytest.raises(ValueError, match="image sizes of 1"):
        score_batch(["a"] * 3, specs, image_sizes=given[:1])


def test_a_function_with_typed_parameters_is_a_verifier() -> None:
    spec = RewardSpec(ground_truth="x", verifier="test_length", verifier_parm={"most": 3})
    assert score("abc", spec).accuracy == 1.0
    assert score("abcd", spec).accuracy == 0.0
    assert score("abcd", spec).components == {"length": 4.0}


def test_an_unknown_verifier_is_named_with_its_nearest() -> None:
    assert "did you mean 'detection'?" in (validate_spec(RewardSpec(ground_truth="1", verifier="detecton")) or "")
    assert score("x", RewardSpec(ground_truth="1", verifier="detecton")).status == "fault"


def test_an_unknown_or_ill_typed_parameter_is_named_with_its_nearest() -> None:
    spec = RewardSpec(ground_truth="x", verifier="test_length", verifier_parm={"mots": 3})
    assert "did you mean 'most'?" in (validate_spec(spec) or "")
    spec = RewardSpec(ground_truth="x", verifier="test_length", verifier_parm={"most": "many"})
    assert "$.most" in (validate_spec(spec) or "")


def test_keys_of_the_row_schema_are_welcome_on_every_row() -> None:
    parm = {"verifier_style": "rule", "det_verifier_normalized": False, "det_reward_ratio": {"map": 1.0}, "most": None}
    assert validate_spec(RewardSpec(ground_truth="x", verifier="test_length", verifier_parm=parm)) is None


def test_a_verifier_that_raises_faults_its_own_sample_only() -> None:
    specs = [RewardSpec(ground_truth="1", verifier=name) for name in ("test_length", "test_raises", "mathverify")]
    verdicts = score_batch(["a", "b", r"\boxed{1}"], specs)
    assert [verdict.status for verdict in verdicts] == ["ok", "fault", "ok"]
    assert verdicts[1].reason == "test_raises: RuntimeError: broken"


def test_an_answer_without_what_a_verifier_reads_is_a_bad_answer_and_such_a_gold_a_bad_row() -> None:
    spec = RewardSpec(ground_truth="7", verifier="test_number")
    verdict = score("7 or 8", spec)
    assert (verdict.status, verdict.accuracy, verdict.reason) == (
        "bad_answer",
        0.0,
        "2 different numbers in the answer",
    )
    assert score("seven", spec).accuracy == 1.0
    fault = score("7", RewardSpec(ground_truth="cat", verifier="test_number"))
    assert fault.status == "fault"
    assert fault.reason == "bad row: the gold answer 'cat' is no number: no number in the answer"


def test_a_score_outside_the_unit_interval_is_a_fault() -> None:
    spec = RewardSpec(ground_truth="1", verifier="test_beyond_one")
    assert {score("", spec).status, score("x", spec).status} == {"fault"}


def test_a_name_is_taken_once_and_the_signature_is_checked() -> None:
    with pytest.raises(ValueError, match="registered already"):
        verifier("test_length")
    with pytest.raises(TypeError, match="must take"):
        verifier("test_short")(lambda response: 1.0)
    assert "test_short" not in known_names()


def test_other_packages_register_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("antigravity", "tests.verifiers.entry_point_verifier", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "_entry_points", lambda: {"from_a_package": entry})
    assert "from_a_package" in known_names()
    assert score("x", RewardSpec(ground_truth="x", verifier="from_a_package")).accuracy == 1.0


def test_ratios_must_be_usable_and_a_gold_must_be_there() -> None:
    assert "accuracy_ratio" in (validate_spec(RewardSpec(ground_truth="1", accuracy_ratio=0.0, format_ratio=0.0)) or "")
    assert "accuracy_ratio" in (validate_spec(RewardSpec(ground_truth="1", accuracy_ratio=float("nan"))) or "")
    assert "no gold answer" in (validate_spec(RewardSpec()) or "")
    assert validate_spec(RewardSpec(answer="1")) is None


def test_a_row_of_parquet_becomes_a_spec() -> None:
    row = {
        "answer": "1",
        "ground_truth": None,
        "accuracy_ratio": 1.0,
        "format_ratio": None,
        "verifier": "mathverify",
        "verifier_parm": None,
    }
    assert spec_from_row(row) == RewardSpec(answer="1")
    with pytest.raises(SpecError, match="accuracy_ratio"):
        spec_from_row({"accuracy_ratio": "much"})


def test_an_overlong_response_is_a_bad_answer_unparsed() -> None:
    verdict = score("x" * 101, RewardSpec(ground_truth="1"), options=RewardOptions(max_response_chars=100))
    assert (verdict.status, verdict.reward) == ("bad_answer", 0.0)
    assert "101 characters" in verdict.reason


def test_configured_options_are_the_process_default_and_an_argument_overrides_them() -> None:
    before = current_options()
    try:
        configure(RewardOptions(max_response_chars=3))
        assert score("xxxx", RewardSpec(ground_truth="1", verifier="test_length")).status == "bad_answer"
        assert score("xxxx", RewardSpec(ground_truth="1", verifier="test_length"), options=before).status == "ok"
    finally:
        configure(before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iou_threshold": 0.0},
        {"iou_threshold": 1.5},
        {"evaluation_threshold": "dynamic"},
        {"iou_schedule": ()},
        {"iou_schedule": (IouStep(0.5, 0.9),)},
        {"iou_schedule": (IouStep(0.5, 0.9), IouStep(0.2, 0.9), IouStep(1.0, 0.9))},
        {"iou_schedule": (IouStep(1.0, 0.0),)},
        {"numeric_tolerance": 1.0},
        {"max_boxes": 0},
        {"deadline_s": float("nan")},
    ],
)
def test_options_outside_their_range_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(OptionsError, match=next(iter(wrong))):
        RewardOptions(**wrong)


def test_importing_the_library_loads_neither_numba_nor_sympy_nor_numpy() -> None:
    probe = "import sys, verifiers; print(sorted({'numba', 'numpy', 'sympy', 'scipy', 'math_verify', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_responses_and_specs_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="1 responses for 0 specs"):
        score_batch(["a"], [])

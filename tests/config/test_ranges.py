"""Every declared range, tried at, below and above each of its ends, on the command line as users write it."""

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec import inspect, structs

from tests.config.keys import keys
from vtriune.config import Config, ConfigError, check, load, override
from vtriune.config.document import parts
from vtriune.config.load import key_problems

ROOT = Path(__file__).parents[2]
THRESHOLDS = "rewards.iou_schedule"
"""Its steps have no defaults, and rise to 1 together."""


def numbers(kind: inspect.Type) -> Iterator[inspect.IntType | inspect.FloatType]:
    """The kind itself, the numeric members of a union, the items of a tuple."""
    match kind:
        case inspect.IntType() | inspect.FloatType():
            yield kind
        case inspect.UnionType():
            for member in kind.types:
                yield from numbers(member)
        case inspect.TupleType():
            yield from numbers(kind.item_types[0])


def written(name: str, kind: inspect.Type, value: float) -> str:
    """The override that gives the key `value`; the other items of a tuple or struct are left in range."""
    text = {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan" if math.isnan(value) else repr(value))
    if isinstance(kind, inspect.TupleType):
        text = f"[{text}, 0.5]"
    listed, _, field = name.partition("[].")
    if listed == THRESHOLDS:
        first = {"until": "0.5", "threshold": "0.5"} | {field: text}
        last = [] if first["until"] in ("1", "1.0") else ["{until: 1.0, threshold: 0.5}"]
        return f"{listed}=[{', '.join([str(first).replace(chr(39), ''), *last])}]"
    return f"{listed}=[{{{field}: {text}}}]" if field else f"{name}={text}"


def step(kind: inspect.IntType | inspect.FloatType, end: float) -> float:
    return 1 if isinstance(kind, inspect.IntType) else max(abs(end), 1.0) * 1e-9


RANGES = [(key.name, key.kind, number) for key in keys() for number in numbers(key.kind)]


def tried() -> Iterator[tuple[str, bool]]:
    """Overrides, and whether each is within its range."""
    for name, kind, number in RANGES:
        ends = ((number.ge, number.gt, -1), (number.le, number.lt, 1))
        for including, excluding, outward in ends:
            end = excluding if including is None else including
            if end is not None:
                yield written(name, kind, end), including is not None
                yield written(name, kind, end - outward * step(number, end)), True
                yield written(name, kind, end + outward * step(number, end)), False
        if isinstance(number, inspect.FloatType):
            for odd in (math.nan, math.inf, -math.inf):
                yield written(name, kind, odd), False
        else:
            for far in (-(10**14), 10**20):
                yield written(name, kind, far), False


def test_every_number_has_a_lower_and_an_upper_end() -> None:
    assert len(RANGES) > 40
    for name, _, number in RANGES:
        assert number.ge is not None or number.gt is not None, f"{name} has no lower end"
        assert number.le is not None or number.lt is not None, (
            f"{name} would take infinity, or what no message can carry"
        )


@pytest.mark.parametrize(("item", "is_allowed"), tried(), ids=lambda value: str(value))
def test_a_number_within_its_range_is_taken_and_one_outside_is_refused_by_its_key(item: str, is_allowed: bool) -> None:
    if is_allowed:
        override(Config(), [item])
        return
    key = item.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"command line: {key.replace('.', '[.]')}\S*: expected .*, got "):
        override(Config(), [item])


def test_numbers_of_every_kind_of_key_are_among_those_tried() -> None:
    tried_keys = {name for name, *_ in RANGES}
    assert {
        "run.seed", "policy.schedule[].until", "policy.schedule[].max_staleness", "optimizer.betas", "cluster.stall_s",
        "rewards.iou_threshold", "rewards.iou_schedule[].until", "rewards.deadline_s", "rewards.memory_gib", "evaluation.rows",
    } <= tried_keys  # fmt: skip
    # A number that hides in a type which `numbers` does not look into would be tried by nobody.
    others = {key.name for key in keys() if "IntType(" in repr(key.kind) or "FloatType(" in repr(key.kind)} - tried_keys
    walked = {"policy.schedule", THRESHOLDS, "data.train", "data.test", "evaluation.files", "data.mixture.schedule"}
    walked |= {"data.mixture.weights", "data.mixture.caps", "data.mixture.schedule[].weights"}
    assert others <= walked, "whose entries are walked one by one, or tried below"


@pytest.mark.parametrize("value", ["-1", ".nan", ".inf", "1e10", "much", "null"])
@pytest.mark.parametrize("key", ["weights", "caps", "schedule"])
def test_a_weight_or_cap_outside_of_its_range_is_refused_by_its_key(key: str, value: str) -> None:
    named = f"{{geo: {value}}}"
    item = f"data.mixture.{key}=" + (f"[{{weights: {named}}}]" if key == "schedule" else named)
    with pytest.raises(ConfigError, match=rf"data[.]mixture[.]{key}\S*: expected .*, got "):
        override(Config(), [item])


def texts() -> Iterator[tuple[str, str]]:
    """Every key that takes text, and the override that makes it, or one of its items, empty."""
    for key in keys():
        listed, _, field = key.name.partition("[].")
        for kind in (key.kind, *getattr(key.kind, "types", ())):
            items = getattr(kind, "item_type", None)
            if isinstance(kind, inspect.StrType):
                yield key.name, f"{listed}=[{{{field}: ''}}]" if field else f"{key.name}=''"
            elif any(isinstance(item, inspect.StrType) for item in (items, *getattr(items, "types", ()))):
                yield key.name, f"{listed}=[{{{field}: ['']}}]" if field else f"{key.name}=['']"


@pytest.mark.parametrize(("name", "item"), texts(), ids=lambda value: str(value))
def test_an_empty_text_is_refused_by_its_key_unless_the_key_says_what_it_means(
    name: str, item: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = next(key.text for part in parts() for key in part.keys if key.name == name)
    if "empty:" in text:
        check(load("examples/digits.yaml", [item]))
        return
    named = name.replace(".", "[.]").replace("[][.]", r"\S*[.]")
    with pytest.raises(ConfigError, match=rf"{named}\S*(:| is) "):
        check(load("examples/digits.yaml", [item]))


def choices() -> Iterator[tuple[str, str]]:
    """Every key that takes one of several words, and the override that gives it, or one of its items, another."""
    for key in keys():
        members = (key.kind, *getattr(key.kind, "types", ()))
        if any(isinstance(kind, inspect.LiteralType) for kind in members):
            listed, _, field = key.name.partition("[].")
            yield listed, f"{listed}=[{{{field}: none_of_them}}]" if field else f"{listed}=none_of_them"
        elif any(isinstance(getattr(kind, "item_type", None), inspect.LiteralType) for kind in members):
            yield key.name, f"{key.name}=[none_of_them]"


@pytest.mark.parametrize(("name", "item"), choices(), ids=lambda value: str(value))
def test_a_word_that_is_none_of_a_keys_is_refused_with_those_that_are(name: str, item: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name.replace('.', '[.]')}\S*: expected .* or .*, got"):
        override(Config(), [item])


NEVER_SENSIBLE = [
    "run.seed=-1", "run.seed=100000000000000", "cluster.generators.gpus=-2", "cluster.generators.memory_share=1.7",
    "cluster.verifiers.workers=0", "cluster.stall_s=0", "evaluation.rows=-5", "policy.lease_s=.nan",
    "policy.schedule=[{max_staleness: -3}]", "sampling.temperature=.inf", "optimizer.betas=[0.9, 1.0]",
    "rewards.deadline_s=.inf", "rewards.iou_threshold=.nan", "rewards.max_fault_rate=-0.1", "rewards.memory_gib=.inf",
    "rewards.python=[json]", "sampling.temperature=0.001", "policy.lease_s=1e-9", 'run.name="a\\0b"', f"run.name={'n' * 300}",
]  # fmt: skip


@pytest.mark.parametrize("item", NEVER_SENSIBLE)
def test_values_that_no_run_can_mean_are_refused(item: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(override(Config(), [item]))
    assert item.partition("=")[0] in str(caught.value)


def test_all_keys_that_are_wrong_are_told_at_once_unknown_ones_and_wrong_types_included() -> None:
    with pytest.raises(ConfigError) as caught:
        override(
            Config(),
            [
                "run.seed=-1",
                "polcy.mode=on_policy",
                "policy.schedule=[{until: 2.0, mod: x}]",
                "loss.kind=ppo",
                "run.steps=2.5",
            ],
        )
    assert sorted(str(caught.value).splitlines()) == [
        "command line: loss.kind: expected grpo or dr_grpo or gspo or cispo, got 'ppo'",
        "command line: policy.schedule[0].until: expected a number in (0, 1] or null, got 2.0",
        "command line: run.seed: expected an integer in [0, 4000000], got -1",
        "command line: run.steps: expected an integer ≥ 1 or null, got 2.5",
        "command line: unknown key polcy; did you mean policy?",
        "command line: unknown key policy.schedule[0].mod; did you mean policy.schedule[0].mode?",
    ]


def test_a_key_without_a_default_that_an_entry_leaves_out_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.iou_schedule\[1\]\.until: missing"):
        override(Config(), ["rewards.iou_schedule=[{until: 0.5, threshold: 0.9}, {threshold: 0.95}]"])


class Ends(msgspec.Struct):
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"ends.low is {self.low}\nends.high is {self.high}")


class Tree(msgspec.Struct):
    ends: Ends = msgspec.field(default_factory=Ends)


def test_what_a_library_s_own_options_refuse_is_told_line_by_line_with_the_rest() -> None:
    assert list(key_problems({"ends": {"low": 2}, "end": 1}, Tree)) == [
        "ends.low is 2",
        "ends.high is 1",
        "unknown key end; did you mean ends?",
    ]
    assert list(key_problems({"ends": {"low": "x"}}, Tree)) == ["ends.low: expected an integer, got 'x'"]


def test_a_configuration_built_without_a_file_is_held_to_the_same_ranges() -> None:
    config = Config()
    with pytest.raises(ConfigError, match=r"policy\.rollout_batch: expected an integer ≥ 1, got 0"):
        check(structs.replace(config, policy=structs.replace(config.policy, rollout_batch=0)))

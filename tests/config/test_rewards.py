"""`rewards.*`: the reward library's options under their own names, and what only a run has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from verifiers import RewardOptions
from vtriune.config import Config, ConfigError, load, override, to_yaml

ROOT = Path(__file__).parents[2]
KEY = re.compile(r"\brewards\.([a-z_]+)\b(?![(\[])")


def named_keys(path: Path) -> Iterator[str]:
    """Keys `rewards.<key>` in the texts of a file: what its messages and docstrings tell a user to set."""
    if path.suffix == ".md":
        yield from KEY.findall(path.read_text())
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from KEY.findall(node.value)


def test_every_reward_key_that_a_message_names_is_a_key_of_the_file() -> None:
    known = set(type(Config().rewards).__struct_fields__)
    packages = ("vtriune", "actors", "learner", "verifiers", "bench")
    texts = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    named = {path: set(named_keys(path)) for path in [*texts, ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert sum(map(bool, named.values())) > 3
    assert {path.name: keys - known for path, keys in named.items() if keys - known} == {}


def test_the_files_section_has_the_librarys_options_under_their_names_with_their_defaults() -> None:
    defaults = msgspec.structs.asdict(RewardOptions())
    section = msgspec.structs.asdict(Config().rewards)
    assert defaults == {name: section.get(name) for name in defaults}
    assert Config().rewards.options == RewardOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iou_schedule: [{until: 0.5, threshold: 0.9}]", r"rewards\.iou_schedule .*end at 1"),
        (
            "iou_schedule: [{until: 1.0, threshold: 0}]",
            r"rewards\.iou_schedule\[0\]\.threshold: expected a number in \(0, 1\]",
        ),
        ("iou_schedule: [[1.0, 0.9]]", r"rewards\.iou_schedule"),
        ("correct_component: nothing", r"rewards\.correct_component is 'nothing'"),
        ("python: [json]", r"rewards\.python: expected a list of text "),
    ],
)
def test_a_value_outside_its_range_is_refused_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"rewards: {{{text}}}")
    with pytest.raises(ConfigError, match=message) as refusal:
        load(path)
    assert "rewards: rewards." not in str(refusal.value)


def test_every_wrong_value_of_the_section_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        override(Config(), ["rewards.deadline_s=0", "rewards.memory_gib=0", "rewards.numeric_tolerance=2"])
    assert all(f"rewards.{key}" in str(refusal.value) for key in ("deadline_s", "memory_gib", "numeric_tolerance"))


def test_a_file_of_every_key_gives_its_options_and_is_written_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "rewards:\n  iou_schedule: [{until: 0.5, threshold: 0.7}, {until: 1.0, threshold: 0.9}]\n"
        "  python: ['mine:judge']\n  fold_case: all\n  evaluation_threshold: average\n  memory_gib: 1.5\n"
    )
    config = load(path)
    options = config.rewards.options
    assert type(options) is RewardOptions
    assert (options.threshold_at(0.4), options.threshold_at(0.6), options.threshold_at(None)) == (0.7, 0.9, None)
    assert (options.python, options.fold_case, config.rewards.memory_gib) == (("mine:judge",), "all", 1.5)
    path.write_text(to_yaml(config))
    assert load(path) == config

"""What may change between the starts of a run: every key has a rule, and values are compared as they mean."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.config.keys import keys
from vtriune.config import Config, to_yaml
from vtriune.config.changes import RULES, changes_between, rule_of
from vtriune.config.load import override

REFUSED = {"run.seed", "model.path", "model.freeze"}


def written(*overrides: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(to_yaml(override(Config(), overrides)))
    return tree


def test_every_key_of_the_tree_may_change_or_is_refused_with_a_reason() -> None:
    """A key of `run`, `model` or `data`, on which all that a checkpoint holds depends, is decided on by itself."""
    names = [key.name for key in keys() if "[]" not in key.name]
    assert {name for name in names if not rule_of(name).is_free} == REFUSED
    assert not {"run", "model", "data"} & RULES.keys()
    for name in RULES:
        assert name in names or any(key.startswith(f"{name}.") for key in names), f"{name} is no key or section"
        assert rule_of(name).text


def test_a_key_without_a_rule_is_named() -> None:
    with pytest.raises(KeyError, match=r"model\.colour: say in vtriune/config/changes\.py"):
        rule_of("model.colour")


def test_the_configuration_as_a_file_holds_it_is_no_change_and_each_other_value_is_named_with_both() -> None:
    config = override(Config(), ["optimizer.lr=1e-7", "policy.schedule=[{until: .5, mode: off_policy}, {}]"])
    assert changes_between(yaml.safe_load(to_yaml(config)), config) == []
    found = changes_between(written("policy.group_size=4", "tracking.wandb='off'"), config)
    assert [change.key for change in found] == [
        "policy.group_size",
        "policy.schedule",
        "optimizer.lr",
        "tracking.wandb",
    ]
    assert str(found[0]) == "policy.group_size: 4 → 8"
    assert [change.refusal for change in found] == [None] * 4


def test_a_key_that_the_earlier_file_did_not_know_had_its_default_and_one_that_is_gone_is_passed_over() -> None:
    before = written("policy.lease_s=9")
    del before["policy"]["lease_s"], before["tracking"]
    before["policy"]["colour"] = "red"
    assert changes_between(before, Config()) == []
    assert [str(change) for change in changes_between(before, override(Config(), ["policy.lease_s=9"]))] == [
        "policy.lease_s: 600.0 → 9.0"
    ]


def test_one_folder_or_set_of_modules_written_in_another_way_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = written(f"model.path={tmp_path}/model", "model.freeze=[vit, connector]")
    assert (
        changes_between(before, override(Config(), [f"model.path={tmp_path}/link", "model.freeze=[connector, vit]"]))
        == []
    )
    changed = changes_between(
        before, override(Config(), [f"model.path={tmp_path}", "model.freeze=[vit]", "run.seed=1"])
    )
    assert {change.key for change in changed} == REFUSED
    assert all(change.refusal and "begin a new run" in change.refusal for change in changed)

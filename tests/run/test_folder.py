"""Whether a run may go on from what lies in its folder; `tests/test_launch.py` has the same through the command."""

import os
from pathlib import Path

import msgspec
import pytest

from tests.run.stage import Stage
from vtriune.config import Config, ConfigError, to_yaml
from vtriune.config.load import override
from vtriune.config.tree import Policy
from vtriune.run.folder import claim

POLICY = Policy(rollout_batch=6, group_size=2)


async def stopped(folder: Path) -> Config:
    """A run that has ended at version 2, and the configuration that makes it longer."""
    stage = Stage(folder / "run", POLICY, steps=2, checkpoint_every=1)
    await stage.run()
    config = msgspec.structs.replace(stage.config, run=msgspec.structs.replace(stage.config.run, folder=str(folder)))
    (folder / "run" / "config.yaml").write_text(to_yaml(config))
    return override(config, ["run.steps=4"])


async def test_damage_to_every_checkpoint_is_an_error_that_leaves_the_run_where_it_is(tmp_path: Path) -> None:
    config = await stopped(tmp_path)
    for weights in (tmp_path / "run" / "checkpoints").glob("*/weights"):
        weights.write_text("torn")
    with pytest.raises(ConfigError, match=r"(?s)--resume-from step-N.*--fresh.*step-2 is damaged.*step-1 is damaged"):
        claim(config, "continue")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("change", ["run.seed=1", "model.path=elsewhere", "model.freeze=[vit]"])
async def test_what_would_be_wrong_under_another_value_is_refused_before_anything_starts(
    tmp_path: Path, change: str
) -> None:
    config = await stopped(tmp_path)
    assert claim(config, "continue").checkpoint == tmp_path / "run" / "checkpoints" / "step-2"
    with pytest.raises(ConfigError, match=f"{change.partition('=')[0]}: "):
        claim(override(config, [change]), "continue")


async def test_a_reference_that_would_get_the_features_of_a_trained_tower_is_refused(tmp_path: Path) -> None:
    trained_tower = override(await stopped(tmp_path), ["model.freeze=[]"])
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(trained_tower))
    with_reference = ["loss.kl=k3", "loss.kl_weight=0.1"]
    with pytest.raises(ConfigError, match=r"model\.freeze: \[\] → .*reference"):
        claim(override(trained_tower, [*with_reference, "model.freeze=[vit, connector]"]), "continue")
    assert claim(override(trained_tower, with_reference), "continue").checkpoint is not None


@pytest.mark.parametrize("left", ["", "- a list\n", "run: {"], ids=["emptied", "no sections", "torn"])
async def test_a_configuration_of_the_start_before_that_says_nothing_is_refused_by_its_name(
    tmp_path: Path, left: str
) -> None:
    config = await stopped(tmp_path)
    (tmp_path / "run" / "config.yaml").write_text(left)
    with pytest.raises(ConfigError, match=r"run/config\.yaml: what the run was trained under cannot be read"):
        claim(config, "continue")

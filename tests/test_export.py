"""`python -m vtriune.export`: the model of any checkpoint as a folder that others load, and never of a damaged one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from learner import checkpointing
from tests.learner import oracle, runs, worlds
from tests.learner import ranks_program as program
from vtriune.export import ExportError, export, find, main
from vtriune.record.checkpoint import commit, stage


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two checkpoints of a small trained model."""
    model = worlds.write_model(tmp_path / "model")
    (model / "preprocessor_config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    learner, groups = program.a_learner(model, None)
    for step in (1, 2):
        program.steps(learner, groups, step - 1, 1)
        staging = stage(tmp_path / "run" / "checkpoints", step)
        checkpointing.begin_save(learner, staging).wait()
        commit(staging)
    return tmp_path / "run"


def test_the_export_gives_the_learners_log_probs_in_transformers(tmp_path: Path, run: Path) -> None:
    folder = export(run)
    assert folder == run / "export" / "step-2"
    world, groups, frozen = program.scenarios()["frozen_tower"]
    policy = worlds.make_policy(tmp_path / "model", freeze=frozen)
    trained, _ = program.a_learner(tmp_path / "model", None)
    checkpointing.load(trained, run / "checkpoints" / "step-2")
    policy.load_state_dict(trained.policy.state_dict())
    learner, update, _, _ = runs.prepared(policy, world, groups, model={"freeze": list(frozen)})
    scores = runs.scores_of(learner, update)
    model = oracle.load(folder)
    untrained = oracle.load(tmp_path / "model")
    for (group_id, index), (logprobs, _) in scores.items():
        expected, _ = oracle.logprobs_of(model, world, groups[group_id], index)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    before = oracle.logprobs_of(untrained, world, groups[0], 0)[0]
    assert not np.allclose(before.detach(), scores[0, 0][0], atol=1e-3)
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
    }  # fmt: skip


def test_one_checkpoint_can_be_named_and_the_place_too(tmp_path: Path, run: Path) -> None:
    first = export(run / "checkpoints" / "step-1", tmp_path / "out" / "first")
    assert first == tmp_path / "out" / "first"
    weights = (first / "model.safetensors").read_bytes()
    assert weights == (run / "checkpoints" / "step-1" / "hf" / "model.safetensors").read_bytes()
    assert weights != (run / "checkpoints" / "step-2" / "hf" / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match="exists already"):
        export(run, first)


def test_a_damaged_checkpoint_is_passed_over_by_name_or_refused_when_it_was_named(
    run: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step-2"
    weights = newest / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert find(run) == run / "checkpoints" / "step-1"
    assert f"{newest} is refused" in caplog.text
    with pytest.raises(ExportError, match=r"step-2 is refused: .*model\.safetensors has \d+ bytes"):
        find(newest)
    assert main([str(newest)]) == 2
    assert "cannot export" in capsys.readouterr().err
    assert main([str(run)]) == 0
    assert str(run / "export" / "step-1") in capsys.readouterr().out


def test_folders_that_are_neither_run_nor_checkpoint_say_what_is_missing(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ExportError, match="neither a run"):
        find(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="there are: step-1, step-2"):
        find(run / "checkpoints" / "step-9")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ExportError, match="no complete checkpoint"):
        find(tmp_path / "empty")

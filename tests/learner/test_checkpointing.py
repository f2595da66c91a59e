"""The learner's part of a checkpoint: exact resume, and a Hugging Face folder that others load."""

import json
from pathlib import Path

import pytest
import torch

from learner import checkpointing
from learner.model import hugging_face
from tests.learner import oracle
from tests.learner import ranks_program as program


def test_resuming_gives_the_parameters_of_the_uninterrupted_run_bit_for_bit(
    models: dict[str, Path], tmp_path: Path
) -> None:
    learner, groups = program.a_learner(models["qwen2_5_vl"], None)
    program.steps(learner, groups, 0, 2)
    checkpointing.begin_save(learner, tmp_path).wait()
    groups_before = learner.inbox.state()
    program.steps(learner, groups, 2, 2)
    resumed, _ = program.a_learner(models["qwen2_5_vl"], None)
    checkpointing.load(resumed, tmp_path)
    assert resumed.inbox.state() == groups_before == {"consumed": [0, 1, 2, 3, 4, 5], "open_from": 0}
    program.steps(resumed, groups, 2, 2)
    expected = program.parameters_of(learner)
    assert all(torch.equal(expected[name], value) for name, value in program.parameters_of(resumed).items())


def test_every_tensor_that_is_written_or_read_is_told_as_a_step(
    models: dict[str, Path], tmp_path: Path, told: list[tuple[str, str]]
) -> None:
    learner, groups = program.a_learner(models["qwen2_5_vl"], None)
    program.steps(learner, groups, 0, 1)
    told.clear()
    checkpointing.begin_save(learner, tmp_path).wait()
    names = {f"model.{name}" for name in learner.policy.model.state_dict()}
    moments = {
        f"optimizer.state.{name}.exp_avg" for name, p in learner.policy.model.named_parameters() if p.requires_grad
    }
    written = {step.removeprefix("writes ") for work, step in told if work == "checkpoint"}
    assert moments <= written
    assert str(tmp_path / "hf" / "model.safetensors") in written
    assert sum(step.startswith("copies tensor") for _, step in told) == len(
        {*map(id, dict(learner.policy.model.named_parameters()).values())}
    )
    told.clear()
    checkpointing.load(learner, tmp_path)
    read = {step.removeprefix("has read ") for work, step in told if work == "checkpoint"}
    assert moments <= read
    assert len(names & read) > 10


def test_saving_before_the_first_update_changes_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    plain, groups = program.a_learner(models["qwen2_5_vl"], None)
    saved, _ = program.a_learner(models["qwen2_5_vl"], None)
    resumed, _ = program.a_learner(models["qwen2_5_vl"], None)
    checkpointing.begin_save(saved, tmp_path).wait()
    checkpointing.load(resumed, tmp_path)
    for learner in (plain, saved, resumed):
        program.steps(learner, groups, 0, 1)
    expected = program.parameters_of(plain)
    for learner in (saved, resumed):
        assert all(torch.equal(expected[name], value) for name, value in program.parameters_of(learner).items())


def test_adams_moments_come_back_and_matter(models: dict[str, Path], tmp_path: Path) -> None:
    learner, groups = program.a_learner(models["qwen2_5_vl"], None)
    program.steps(learner, groups, 0, 2)
    checkpointing.begin_save(learner, tmp_path).wait()
    program.steps(learner, groups, 2, 1)
    resumed, _ = program.a_learner(models["qwen2_5_vl"], None)
    checkpointing.load(resumed, tmp_path)
    resumed.optimizer.adamw.state.clear()
    program.steps(resumed, groups, 2, 1)
    expected = program.parameters_of(learner)
    assert any(not torch.equal(expected[name], value) for name, value in program.parameters_of(resumed).items())


def test_the_optimizer_goes_on_as_the_configuration_says_and_not_as_the_checkpoint_was_made(
    models: dict[str, Path], tmp_path: Path
) -> None:
    learner, groups = program.a_learner(models["qwen2_5_vl"], None)
    program.steps(learner, groups, 0, 2)
    checkpointing.begin_save(learner, tmp_path).wait()
    resumed, _ = program.a_learner(models["qwen2_5_vl"], None, weight_decay=0.5, betas=(0.5, 0.6))
    checkpointing.load(resumed, tmp_path)
    assert {(group["weight_decay"], tuple(group["betas"])) for group in resumed.optimizer.adamw.param_groups} == {
        (0.5, (0.5, 0.6)), (0.0, (0.5, 0.6)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "untied"])
def test_the_hugging_face_folder_is_the_trained_model(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    (models[kind] / "preprocessor_config.json").write_text("{}")
    learner, groups = program.a_learner(models[kind], None)
    program.steps(learner, groups, 0, 1)
    checkpointing.begin_save(learner, tmp_path).wait()
    loaded = oracle.load(tmp_path / "hf")
    ours = program.parameters_of(learner)
    assert {name for name, _ in loaded.named_parameters()} == ours.keys()
    assert all(torch.equal(ours[name], p) for name, p in loaded.named_parameters())
    assert (tmp_path / "hf" / "preprocessor_config.json").exists()
    assert (tmp_path / "hf" / "generation_config.json").exists()


def test_a_bfloat16_model_is_exported_as_bfloat16(models: dict[str, Path], tmp_path: Path) -> None:
    learner, _ = program.a_learner(models["qwen2_5_vl"], None)
    hugging_face.write_folder(
        hugging_face.snapshot(learner.policy.model, models["qwen2_5_vl"], "bfloat16", keeps=True), tmp_path
    )
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["dtype"], settings["text_config"]["dtype"]) == ("bfloat16", "bfloat16")
    loaded = oracle.load(tmp_path, dtype=torch.bfloat16)
    ours = program.parameters_of(learner)
    assert all(torch.equal(ours[name].bfloat16(), p) for name, p in loaded.named_parameters())


def test_what_is_written_is_the_moment_of_the_copy_though_training_goes_on(
    models: dict[str, Path], tmp_path: Path
) -> None:
    learner, groups = program.a_learner(models["qwen2_5_vl"], None)
    program.steps(learner, groups, 0, 1)
    expected = program.parameters_of(learner)
    writing = checkpointing.begin_save(learner, tmp_path)
    program.steps(learner, groups, 1, 2)
    after = program.parameters_of(learner)
    writing.wait()
    assert (tmp_path / "learner.json").is_file()
    resumed, _ = program.a_learner(models["qwen2_5_vl"], None)
    checkpointing.load(resumed, tmp_path)
    assert all(torch.equal(expected[name], value) for name, value in program.parameters_of(resumed).items())
    exported = dict(oracle.load(tmp_path / "hf").named_parameters())
    assert all(torch.equal(expected[name], value) for name, value in exported.items())
    # Adam's moments are of that moment too: going on from them gives what went on without a pause.
    program.steps(resumed, groups, 1, 2)
    assert all(torch.equal(after[name], value) for name, value in program.parameters_of(resumed).items())


@pytest.mark.parametrize("part", ["dcp", "hf"])
def test_a_write_that_breaks_is_raised_by_whoever_waits_for_it(
    models: dict[str, Path], tmp_path: Path, part: str
) -> None:
    learner, _ = program.a_learner(models["qwen2_5_vl"], None)
    (tmp_path / part).write_text("in the way")
    writing = checkpointing.begin_save(learner, tmp_path)
    for _ in range(2):
        with pytest.raises(OSError, match=part):
            writing.wait()

"""Two FSDP2 ranks = one rank: gradients, metrics, checkpoints; also with images on one rank only, and with a rank without work."""

from pathlib import Path
from typing import Any

import pytest
import torch

from learner import checkpointing
from tests.learner import oracle, runs, worlds
from tests.learner import ranks_program as program

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One unsharded rank: reports and parameters in the middle and at the end, and its checkpoint."""
    folder = tmp_path_factory.mktemp("one")
    learner, groups = program.a_learner(models["qwen2_5_vl"], None)
    reports = program.steps(learner, groups, 0, 2)
    checkpointing.begin_save(learner, folder / "from_one_rank").wait()
    middle = program.parameters_of(learner)
    reports += program.steps(learner, groups, 2, 2)
    return {"folder": folder, "reports": reports, "middle": middle, "end": program.parameters_of(learner)}


@pytest.fixture(scope="module")
def two(models: dict[str, Path], one: dict[str, Any]) -> dict[str, Any]:
    """What two ranks found; they run once for the module."""
    return program.run(program.everything, 2, models["qwen2_5_vl"], one["folder"])


@pytest.mark.parametrize("name", sorted(program.scenarios()))
def test_two_ranks_have_the_gradients_of_one_and_of_transformers(
    models: dict[str, Path], two: dict[str, Any], name: str
) -> None:
    world, groups, frozen = program.scenarios()[name]
    single = program.gradients(models["qwen2_5_vl"], (world, groups, frozen), None)
    _, expected = runs.oracle_update(models["qwen2_5_vl"], world, groups)
    assert two["gradients"][name].keys() == single.keys()
    assert runs.relative_gradient_error(two["gradients"][name], single) < TOLERANCE
    assert runs.relative_gradient_error(two["gradients"][name], {key: expected[key] for key in single}) < TOLERANCE


@pytest.mark.parametrize("kind", program.KINDS)
def test_two_ranks_hold_what_from_pretrained_loads_and_each_read_its_half(
    models: dict[str, Path], two: dict[str, Any], kind: str
) -> None:
    found, expected = two["loaded"][kind], oracle.load(models[kind])
    theirs = {**dict(expected.named_parameters(remove_duplicate=False)), **dict(expected.named_buffers())}
    assert found["values"].keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(found["values"][name], value), name
    assert found["blocked"].tolist() == ([] if kind == "qwen3" else [worlds.IMAGE, worlds.VIDEO])
    assert found["read"] <= 0.55 * found["total"]


def test_the_scenarios_put_images_on_one_rank_only(models: dict[str, Path]) -> None:
    world, groups, _ = program.scenarios()["trained_tower_images_on_one_rank"]
    learner, update, _, _ = runs.prepared(worlds.make_policy(models["qwen2_5_vl"]), world, groups, model={"freeze": []})
    learner.num_ranks = 2
    batch = list(update.graded[0].examples)
    owners = []
    for learner.rank in (0, 1):
        owners.append(
            [
                bool(learner.prompts.has_images(batch[p.group].scored.group))
                for m in learner._plan(batch, [0, 1])
                for p in m
            ]
        )
    assert owners == [[True], [False]]


def test_two_ranks_with_a_reference_finish_also_with_one_that_has_no_work_and_measure_the_kl_of_one_rank(
    models: dict[str, Path], tmp_path: Path
) -> None:
    double = program.run(program.kl_reports, 2, models["qwen2_5_vl"], tmp_path, deadline_s=150)
    single = program.kl_reports(None, models["qwen2_5_vl"], tmp_path)
    assert double.keys() == single.keys()
    for name, reports in single.items():
        # Equal models at first, different ones after a step.
        assert [double[name][0]["kl/reference"], reports[0]["kl/reference"]] == [0, 0], name
        assert reports[1]["kl/reference"] > 1e-4, name
        for key in ("kl/reference", "loss", "grad_norm"):
            assert double[name][1][key] == pytest.approx(reports[1][key], rel=1e-3), (name, key)


def test_metrics_are_those_of_one_rank(one: dict[str, Any], two: dict[str, Any]) -> None:
    timed = {"time/learn_s", "time/vit_s", "packing/fill"}
    for single, double in zip(one["reports"], two["reports"], strict=True):
        assert single.keys() == double.keys()
        for key in single.keys() - timed:
            assert double[key] == pytest.approx(single[key], rel=1e-3, abs=1e-5), key


def test_parameters_after_four_versions_are_those_of_one_rank(one: dict[str, Any], two: dict[str, Any]) -> None:
    for name, value in one["end"].items():
        torch.testing.assert_close(two["end"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_checkpoint_resumes_bit_for_bit(two: dict[str, Any]) -> None:
    assert all(torch.equal(two["end"][name], value) for name, value in two["again"].items())


def test_a_checkpoint_of_one_rank_loads_on_two(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert all(torch.equal(one["middle"][name], value) for name, value in two["foreign"].items())


def test_a_checkpoint_of_two_ranks_loads_on_one_and_goes_on_as_two_would(
    models: dict[str, Path], one: dict[str, Any], two: dict[str, Any]
) -> None:
    learner, groups = program.a_learner(models["qwen2_5_vl"], None)
    checkpointing.load(learner, one["folder"] / "checkpoint")
    assert all(torch.equal(two["middle"][name], value) for name, value in program.parameters_of(learner).items())
    program.steps(learner, groups, 2, 2)
    for name, value in program.parameters_of(learner).items():
        torch.testing.assert_close(value, two["end"][name], rtol=1e-3, atol=1e-4, msg=name)

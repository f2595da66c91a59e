"""Weights are read into meta models as transformers' `from_pretrained` reads them, bit for bit, and written as they lay."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.model.hugging_face import WeightsError, read_weights, snapshot, write_folder
from tests.learner import oracle, worlds

DIGITS = Path(__file__).parents[3] / "examples" / "digits" / "model"


def ours(folder: Path) -> torch.nn.Module:
    return worlds.make_policy(folder).model


def values_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters under all their names, and buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    mine, theirs = values_of(found), values_of(expected)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype, name
        assert torch.equal(mine[name], value), name


@pytest.fixture
def copy(models: dict[str, Path], tmp_path: Path) -> Path:
    """A Qwen2.5-VL folder of the test's own, tied."""
    return Path(shutil.copytree(models["qwen2_5_vl"], tmp_path / "model"))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "untied", "qwen3_vl", "qwen3"])
def test_parameters_and_buffers_are_those_of_from_pretrained_bit_for_bit(models: dict[str, Path], kind: str) -> None:
    assert_same(ours(models[kind]), oracle.load(models[kind]))


def test_so_are_those_of_the_shipped_model() -> None:
    assert_same(ours(DIGITS), oracle.load(DIGITS))


def test_a_tied_output_layer_is_one_parameter_with_the_embedding(models: dict[str, Path]) -> None:
    for kind in ("qwen2_5_vl", "untied", "qwen3", "qwen3_vl"):
        model: Any = ours(models[kind])
        is_one = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert is_one == (kind != "untied"), kind


def test_bfloat16_files_are_read_into_float32(copy: Path) -> None:
    path = copy / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    assert_same(ours(copy), oracle.load(copy))


def test_a_folder_of_several_files_is_read_and_written_in_its_own_layout(
    models: dict[str, Path], tmp_path: Path
) -> None:
    oracle.load(models["untied"]).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 3
    model = ours(tmp_path / "many")
    assert_same(model, oracle.load(models["untied"]))
    write_folder(snapshot(model, tmp_path / "many", "float32", keeps=True), tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").glob("*.safetensors")) == names
    for name in names:
        first, second = load_file(tmp_path / "many" / name), load_file(tmp_path / "again" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert_same(oracle.load(tmp_path / "again"), model)


def test_every_other_file_of_the_source_comes_along(copy: Path, tmp_path: Path) -> None:
    (copy / "preprocessor_config.json").write_text('{"a": 1}')
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "pytorch_model.bin").write_bytes(b"old weights")
    write_folder(snapshot(ours(copy), copy, "bfloat16", keeps=True), tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in copy.iterdir()} - {"pytorch_model.bin"}
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"a": 1}'
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["dtype"], settings["text_config"]["dtype"]) == ("bfloat16", "bfloat16")


def edit(folder: Path, change: Any) -> dict[str, torch.Tensor]:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return tensors


def key_like(folder: Path, part: str) -> str:
    return next(key for key in load_file(folder / "model.safetensors") if part in key)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    edit(copy, lambda tensors: tensors.pop(key_like(copy, "layers.1.mlp.up_proj.weight")))
    with pytest.raises(WeightsError, match=r"1 tensors.*layers\.1\.mlp\.up_proj\.weight"):
        ours(copy)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    key = key_like(copy, "layers.0.mlp.down_proj.weight")
    edit(copy, lambda tensors: tensors.update({key: torch.zeros(32, 47)}))
    with pytest.raises(WeightsError, match=r"down_proj\.weight has shape \[32, 47\].*\[32, 48\]"):
        ours(copy)


def test_a_tensor_that_the_model_does_not_know_is_named_in_a_warning(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy, lambda tensors: tensors.update({"mtp.head.weight": torch.zeros(3)}))
    assert_same(ours(copy), oracle.load(copy))
    assert "mtp.head.weight" in caplog.text


def test_a_tied_tensor_is_read_under_either_name_and_both_must_agree(models: dict[str, Path], copy: Path) -> None:
    embedding = key_like(copy, "embed_tokens")
    edit(copy, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert_same(ours(copy), oracle.load(models["qwen2_5_vl"]))
    write_folder(snapshot(ours(copy), copy, "float32", keeps=True), copy.with_name("out"))
    assert load_file(copy.with_name("out") / "model.safetensors").keys() >= {"lm_head.weight", embedding}
    edit(copy, lambda tensors: tensors.pop(embedding))
    assert_same(ours(copy), oracle.load(models["qwen2_5_vl"]))
    edit(copy, lambda tensors: tensors.update({embedding: tensors["lm_head.weight"] + 1}))
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        ours(copy)


def test_a_folder_without_safetensors_says_so(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model.bin")
    with pytest.raises(WeightsError, match=r"neither .* nor model\.safetensors"):
        ours(copy)


def test_reading_again_brings_a_trained_model_back(models: dict[str, Path]) -> None:
    model = ours(models["qwen2_5_vl"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    read_weights(model, models["qwen2_5_vl"])
    assert_same(model, oracle.load(models["qwen2_5_vl"]))

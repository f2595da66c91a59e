"""What a publish may carry, told from the model folder."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from actors.engine.expected_tensors import Expectation, ManifestMismatch
from vtriune.messages import WeightEntry

MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "qkv": ["qkv"]}
SHAPES = {
    "model.embed_tokens.weight": [8, 4],
    "model.layers.0.attn.q_proj.weight": [4, 4],
    "model.layers.0.attn.q_proj.bias": [4],
    "model.layers.0.attn.k_proj.weight": [2, 4],
    "model.layers.0.attn.v_proj.weight": [2, 4],
    "model.layers.0.attn.o_proj.weight": [4, 4],
    "visual.blocks.0.attn.qkv.weight": [12, 4],
}
STATE = {
    name.replace("model.", "model.language_model.").replace("visual.", "model.visual."): shape
    for name, shape in SHAPES.items()
}
HEAD = {"lm_head.weight": [8, 4]}


def name_of(name: str) -> str | None:
    """The engine's naming, as vLLM has it for Qwen2.5-VL; `rotary` buffers are ignored."""
    if "rotary" in name:
        return None
    for prefix, new in (
        ("model.language_model.", "language_model.model."),
        ("model.visual.", "visual."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ):
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return name


@pytest.fixture(scope="module")
def expectation(tmp_path_factory: pytest.TempPathFactory) -> Expectation:
    folder = tmp_path_factory.mktemp("model")
    names = list(SHAPES)
    for part, chosen in enumerate((names[:3], names[3:])):
        save_file({name: torch.zeros(SHAPES[name]) for name in chosen}, folder / f"model-{part}.safetensors")
    return Expectation(folder, name_of, MERGED)


def entries(shapes: dict[str, list[int]]) -> list[WeightEntry]:
    return [WeightEntry(name, shape, "float32") for name, shape in shapes.items()]


def test_a_full_state_dict_with_the_tied_output_layer_fits(expectation: Expectation) -> None:
    expectation.match(entries({**STATE, **HEAD}), full=True)


def test_a_full_publish_without_the_tied_output_layer_is_refused(expectation: Expectation) -> None:
    with pytest.raises(ManifestMismatch, match=r"1 tensors missing \(a full publish sends every tensor\).*lm_head"):
        expectation.match(entries(STATE), full=True)


def test_whole_modules_may_travel_alone(expectation: Expectation) -> None:
    expectation.match(entries({k: v for k, v in STATE.items() if "o_proj" in k}), full=False)
    expectation.match(entries({k: v for k, v in STATE.items() if "visual" not in k}), full=False)


@pytest.mark.parametrize(
    "left_out", [name for name in STATE if "0.attn" in name and "o_proj" not in name and "visual" not in name]
)
def test_part_of_a_merged_module_is_refused(expectation: Expectation, left_out: str) -> None:
    chosen = {k: v for k, v in STATE.items() if ".attn." in k and "visual" not in k and k != left_out}
    with pytest.raises(ManifestMismatch, match="loaded whole or not at all"):
        expectation.match(entries(chosen), full=False)


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.9.attn.o_proj.weight", "made.up", "model.rotary.inv_freq"]
)
def test_an_unknown_name_is_refused_by_name(expectation: Expectation, name: str) -> None:
    with pytest.raises(ManifestMismatch, match=f"1 tensors the engine's model does not have: {name}"):
        expectation.match(entries({**STATE, **HEAD, name: [2, 2]}), full=True)


def test_another_shape_is_refused_with_both_shapes(expectation: Expectation) -> None:
    wrong = {**STATE, **HEAD, "model.language_model.embed_tokens.weight": [9, 4]}
    with pytest.raises(ManifestMismatch, match=r"embed_tokens\.weight is \[9, 4\], the engine's \[8, 4\]"):
        expectation.match(entries(wrong), full=True)


def test_a_tensor_sent_twice_is_refused(expectation: Expectation) -> None:
    full = entries({**STATE, **HEAD})
    with pytest.raises(ManifestMismatch, match=r"sent twice: language_model\.model\.embed_tokens\.weight"):
        expectation.match([*full, full[0]], full=True)


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted({**STATE, **HEAD}))))
def test_a_full_publish_fits_only_when_it_is_full(chosen: set[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, Path(folder) / "model.safetensors")
        expectation = Expectation(Path(folder), name_of, MERGED)
    sent = entries({name: {**STATE, **HEAD}[name] for name in sorted(chosen)})
    if len(chosen) == len(STATE) + 1:
        expectation.match(sent, full=True)
    else:
        with pytest.raises(ManifestMismatch):
            expectation.match(sent, full=True)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        Expectation(tmp_path, name_of, MERGED)

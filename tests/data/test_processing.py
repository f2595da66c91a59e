"""Preprocessing against transformers' own processor: same text, same ids, same patches, for engine and learner."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.encodings import saved
from tests.data.rows import MODEL, encoded
from verifiers import RewardSpec
from vtriune.data.patch_grid import PatchGrid
from vtriune.data.processing import Preprocessor, response_decoder
from vtriune.data.schema import DataError, Sample, Turn
from vtriune.torchvision_schemas import define_missing_schemas

MIN_PIXELS, MAX_PIXELS = 56 * 56, 168 * 168
SIDES = st.integers(1, 5000)
SIZES = st.tuples(st.integers(20, 400), st.integers(20, 400))


@pytest.fixture(scope="module")
def ours() -> Preprocessor:
    return Preprocessor(MODEL, MIN_PIXELS, MAX_PIXELS, 512)


@pytest.fixture(scope="module")
def theirs(ours: Preprocessor) -> Any:
    define_missing_schemas()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(MODEL)


def sample(*sizes: tuple[int, int], text: str | None = None, verifier: str = "mathverify", kind: str = "PNG") -> Sample:
    images = [encoded(*size, seed, kind) for seed, size in enumerate(sizes)]
    turns = [
        Turn("user", "".join(f"image {i}: <image> " for i in range(len(sizes))) + "Count." if text is None else text)
    ]
    return Sample(7, "digits", turns, images, RewardSpec(ground_truth="1", verifier=verifier), "math", "id-7")


@settings(max_examples=30, deadline=None)
@given(st.lists(SIZES, max_size=3), st.none() | st.integers(0, 2**31))
def test_features_are_those_of_transformers_processor(
    ours: Preprocessor, theirs: Any, sizes: list[tuple[int, int]], seed: int | None
) -> None:
    prompt = ours.prepare(sample(*sizes), seed)
    oracle = theirs(
        text=[prompt.text], images=prompt.images or None, images_kwargs=ours.mm_processor_kwargs(), return_tensors="np"
    )
    np.testing.assert_array_equal(prompt.prompt_ids, oracle["input_ids"][0])
    assert prompt.prompt_ids.dtype == np.int32
    if sizes:
        np.testing.assert_array_equal(prompt.pixel_values, oracle["pixel_values"])
        np.testing.assert_array_equal(prompt.image_grid_thw, oracle["image_grid_thw"])
    assert (prompt.pixel_values.dtype, prompt.pixel_values.shape[1]) == (np.float32, 1176)
    assert (prompt.image_grid_thw.dtype, prompt.image_grid_thw.shape) == (np.int64, (len(sizes), 3))


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_an_image_is_resampled_once_and_lies_within_the_bounds(ours: Preprocessor, size: tuple[int, int]) -> None:
    prompt = ours.prepare(sample(size))
    (image,) = prompt.images
    assert image.mode == "RGB"
    assert image.width % 28 == image.height % 28 == 0
    assert MIN_PIXELS <= image.width * image.height <= MAX_PIXELS
    # The processor finds it on the grid and leaves its pixels alone: undoing the normalisation gives them back.
    grid = prompt.image_grid_thw[0]
    patches = prompt.pixel_values.reshape(grid[1] // 2, grid[2] // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    pixels = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(image.height, image.width, 3)
    np.testing.assert_allclose(pixels * 127.5 + 127.5, np.asarray(image), atol=1e-3)


def test_the_engine_gets_one_pad_per_image_and_its_expansion_is_checked(ours: Preprocessor) -> None:
    prompt = ours.prepare(sample((112, 112), (84, 140)))
    assert prompt.engine_ids.count(ours.image_token_id) == 2
    expanded = prompt.prompt_ids
    assert (expanded == ours.image_token_id).sum() == 16 + 15
    np.testing.assert_array_equal(ours.check_expansion(prompt, expanded.tolist()), expanded)
    twice = np.insert(expanded, int(np.argmax(expanded == ours.image_token_id)), ours.image_token_id)
    with pytest.raises(DataError, match=r"with 32 image pads, ours has .* with 31.*mm_processor_kwargs="):
        ours.check_expansion(prompt, twice)
    with pytest.raises(DataError, match=r"row 7 \(sample 'id-7' of digits\): the engine expanded"):
        ours.check_expansion(prompt, expanded[:-1])


def test_a_prompt_over_the_limit_is_refused_and_one_at_the_limit_is_whole(ours: Preprocessor) -> None:
    length = len(ours.prepare(sample((112, 112))).prompt_ids)
    at_limit = Preprocessor(MODEL, MIN_PIXELS, MAX_PIXELS, length)
    assert len(at_limit.prepare(sample((112, 112))).prompt_ids) == length
    below = Preprocessor(MODEL, MIN_PIXELS, MAX_PIXELS, length - 1)
    with pytest.raises(DataError, match=rf"row 7 .*the prompt has {length} tokens, images included.*is {length - 1}"):
        below.prepare(sample((112, 112)))


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=60), st.integers(0, 2), st.integers(0, 2**31), st.integers(5, 140), st.sampled_from([0, 8, 1024])
)
def test_what_passes_the_check_at_load_is_prepared_under_every_seed(
    ours: Preprocessor, text: str, num_markers: int, seed: int, limit: int, slack: int
) -> None:
    ours.max_prompt_tokens, before = limit + slack, ours.max_prompt_tokens
    try:
        candidate = sample((112, 84), text="<image>" * num_markers + text)
        if isinstance(ours.prompt_lengths([candidate], prompt_pool=True)[0], int):
            assert len(ours.prepare(candidate, seed).prompt_ids) <= limit + slack
        elif num_markers != 1:
            with pytest.raises(DataError, match="markers for 1 images"):
                ours.prepare(candidate, seed)
    finally:
        ours.max_prompt_tokens = before


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=20))
def test_the_archives_decoder_gives_the_text_that_was_scored(ours: Preprocessor, ids: list[int]) -> None:
    ends, decoder = ours.end_token_ids, response_decoder(str(MODEL))
    assert decoder is not None
    assert all(decoder.decode(some) == ours.decode(some) for some in (ids, [*ids, *ends], [*ends, *ids, *ends, *ends]))


def test_the_check_at_load_counts_the_longest_sentences_of_the_pool_only_where_they_are_added(
    ours: Preprocessor,
) -> None:
    plain = len(ours.prepare(sample((112, 112))).prompt_ids)
    tight = Preprocessor(MODEL, MIN_PIXELS, MAX_PIXELS, plain)
    assert tight.prompt_lengths([sample((112, 112))], prompt_pool=False) == [plain]
    (problem,) = tight.prompt_lengths([sample((112, 112))], prompt_pool=True)
    assert str(problem).endswith(f"data.max_prompt_tokens is {plain}")
    assert tight.prompt_lengths([sample((112, 112), verifier="detection")], prompt_pool=True) == [plain]


def test_lengths_of_many_prompts_are_those_of_each_and_a_bad_one_changes_no_other(ours: Preprocessor) -> None:
    samples = [sample((84, 84)), sample((84, 84), text="no marker"), sample(text="What?"), sample((28, 200), (112, 84))]
    lengths = ours.prompt_lengths(samples, prompt_pool=False)
    good = [number for number in range(4) if number != 1]
    assert [lengths[number] for number in good] == [len(ours.prepare(samples[number]).prompt_ids) for number in good]
    assert "0 <image> markers for 1 images" in str(lengths[1])
    assert ours.prompt_lengths([], prompt_pool=True) == []


def test_only_mathverify_samples_with_a_seed_get_a_sentence_of_the_pool(ours: Preprocessor) -> None:
    plain = ours.prepare(sample((84, 84))).text
    assert ours.prepare(sample((84, 84)), 3).text != plain
    assert ours.prepare(sample((84, 84)), 3).text == ours.prepare(sample((84, 84)), 3).text
    assert ours.prepare(sample((84, 84), verifier="detection"), 3).text == plain


@pytest.mark.parametrize("text", ["<image> and <|image_pad|>", "<image> and <|video_pad|>"])
def test_a_pad_written_in_the_data_is_refused(ours: Preprocessor, text: str) -> None:
    with pytest.raises(DataError, match="must not contain"):
        ours.prepare(sample((84, 84), text=text))
    assert "must not contain" in str(ours.prompt_lengths([sample((84, 84), text=text)], prompt_pool=False)[0])


@pytest.mark.parametrize("data", [b"", b"no image", encoded(80, 80)[:400], encoded(80, 80, kind="JPEG")[:900]])
def test_a_broken_image_is_named(ours: Preprocessor, data: bytes) -> None:
    broken = Sample(7, "digits", [Turn("user", "<image>")], [data], RewardSpec(), "", "id-7")
    with pytest.raises(DataError, match=r"row 7 \(sample 'id-7' of digits\): images\[0\] (cannot be decoded|is empty)"):
        assert ours.prepare(broken).images


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(ours: Preprocessor, mode: str) -> None:
    out = io.BytesIO()
    Image.open(io.BytesIO(encoded(84, 84))).convert(mode).save(out, "TIFF" if mode == "CMYK" else "PNG")
    prompt = ours.prepare(Sample(0, "s", [Turn("user", "<image>")], [out.getvalue()], RewardSpec(), "", ""))
    assert (prompt.images[0].mode, prompt.images[0].size) == ("RGB", (84, 84))


EXIF = Image.Exif()
EXIF[274] = 6
LEFT_DARK = np.repeat(np.repeat([[0.0, 0.0, 1.0, 1.0]], 84, 0), 28, 1)
"""84 rows, 112 columns: the left half black, the right half white."""


@pytest.mark.parametrize(
    "data",
    [
        saved((LEFT_DARK * 65535).astype(np.uint16)),
        saved((LEFT_DARK * 65535).astype(np.uint16), "TIFF"),
        saved(LEFT_DARK.astype(np.float32), "TIFF"),
        saved(np.rot90(LEFT_DARK * 255).astype(np.uint8), "JPEG", exif=EXIF),
        saved(np.dstack([LEFT_DARK * 0, LEFT_DARK * 0, LEFT_DARK * 0, 255 - LEFT_DARK * 255]).astype(np.uint8)),
    ],
    ids=["PNG of 16 bits", "TIFF of 16 bits", "TIFF of floats", "turned photo", "transparent pixels"],
)
def test_the_model_sees_a_picture_as_a_person_does(ours: Preprocessor, data: bytes) -> None:
    prompt = ours.prepare(Sample(0, "s", [Turn("user", "<image>")], [data], RewardSpec(), "", ""))
    assert prompt.image_sizes[0].original == prompt.images[0].size == (112, 84)
    np.testing.assert_allclose(np.asarray(prompt.images[0])[..., 0], LEFT_DARK * 255, atol=6)


def test_a_prompt_tells_each_images_size_in_the_data_and_as_the_model_sees_it(ours: Preprocessor) -> None:
    prompt = ours.prepare(sample((84, 84), (300, 200), text="<image><image>"))
    assert [size.original for size in prompt.image_sizes] == [(84, 84), (300, 200)]
    assert [size.resized for size in prompt.image_sizes] == [image.size for image in prompt.images]
    assert prompt.image_sizes[1].resized != (300, 200)


def test_an_image_too_long_for_the_model_is_refused(ours: Preprocessor) -> None:
    with pytest.raises(DataError, match="image of 10x2400 px: absolute aspect ratio must be smaller than 200"):
        ours.prepare(sample((10, 2400)))


def test_earlier_turns_and_a_system_prompt_reach_the_template(ours: Preprocessor) -> None:
    turns = [Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "See <image>!")]
    prompt = ours.prepare(Sample(0, "s", turns, [encoded(84, 84)], RewardSpec(), "", ""))
    places = [prompt.text.index(part) for part in ("Be brief.", "Hello", "Hi", "See ", "<|image_pad|>", "!")]
    assert places == sorted(places)
    assert prompt.text.endswith("<|im_start|>assistant\n")


def test_decoding_keeps_everything_sampled_but_the_end_tokens(ours: Preprocessor) -> None:
    text = "<think>\n6\n</think>\n<answer>\\boxed{6}</answer>"
    ids = ours.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = ours.end_token_ids[0]
    assert ours.decode(np.asarray([*ids, end], np.int32)) == text
    assert ours.decode([end, *ids]) == ours.tokenizer.decode([end]) + text
    assert ours.decode([]) == ""


def test_pads_to_forbid_are_the_models_image_and_video_pads(ours: Preprocessor) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert ours.pad_token_ids == [config["image_token_id"], config["video_token_id"]]


def test_a_folder_whose_tokenizer_is_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_id": 77}))
    with pytest.raises(DataError, match="image_token_id is 77, but the folder's tokenizer says"):
        Preprocessor(folder, MIN_PIXELS, MAX_PIXELS, 512)


def test_a_folder_without_processor_or_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        Preprocessor(tmp_path, MIN_PIXELS, MAX_PIXELS, 512)
    blind = shutil.copytree(MODEL, tmp_path / "blind", ignore=shutil.ignore_patterns("*.safetensors", "preprocessor_*"))
    with pytest.raises(DataError, match=r"no processor can be loaded \(preprocessor_config.json is missing\)"):
        Preprocessor(blind, MIN_PIXELS, MAX_PIXELS, 512)
    folder = shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    with pytest.raises(DataError, match="has no chat template"):
        Preprocessor(folder, MIN_PIXELS, MAX_PIXELS, 512)


def test_an_image_processor_of_another_patch_size_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"patch_size": 16}))
    with pytest.raises(DataError, match="patch_size 16 and merge_size 2, the model 14 and 2"):
        Preprocessor(folder, MIN_PIXELS, MAX_PIXELS, 512)


def test_a_text_only_model_takes_text_and_refuses_images(tmp_path: Path) -> None:
    folder = shutil.copytree(
        MODEL, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "preprocessor_*")
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "vision_config"})
    )
    textual = Preprocessor(folder, MIN_PIXELS, MAX_PIXELS, 512)
    prompt = textual.prepare(sample())
    assert (prompt.pixel_values.shape, textual.mm_processor_kwargs()) == ((0, 0), {})
    assert "is no vision model" in str(textual.prompt_lengths([sample((56, 56))], prompt_pool=False)[0])
    with pytest.raises(DataError, match="is no vision model"):
        textual.prepare(sample((56, 56)))


@given(SIDES, SIDES, st.integers(1, 3000), st.integers(1, 8))
@example(4317, 4317, 1, 4)  # A whole number of cells, up to rounding.
def test_sizes_on_the_patch_grid_are_those_of_transformers(
    theirs: Any, width: int, height: int, cells: int, span: int
) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    grid = PatchGrid(14, 2, 2, min_pixels=cells * 784, max_pixels=cells * span * 784)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(DataError, match="absolute aspect ratio"):
            grid.size(width, height)
    else:
        rows_px, columns_px = smart_resize(height, width, 28, grid.min_pixels, grid.max_pixels)
        assert grid.size(width, height) == (columns_px, rows_px)


def test_importing_the_data_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, vtriune.data.store, vtriune.data.processing, vtriune.data.validate, vtriune.data.loader, vtriune.record.archive;"
        "print(sorted({'torch', 'transformers', 'numba', 'sympy', 'wandb'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

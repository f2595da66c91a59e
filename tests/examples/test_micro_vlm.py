"""The micro model: its tokenizer, the shipped folder, and the warm start's short cuts against transformers' own forward."""

import io
import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from examples.digits.batches import Mixture, RowStream, collate
from examples.digits.build import SOURCES, rows
from examples.digits.demonstrations import Noise
from examples.digits.measure import AutoModelForImageTextToText, AutoProcessor, answers, chat_text
from examples.digits.micro_vlm import IMAGE_PAD_ID, MODEL_FOLDER, SPECIAL_TOKENS, TEXT_TOKENS, build, build_tokenizer
from examples.digits.rendering import NUM_VARIANTS, CellInk, choose_ink, digit_pool, draw, draw_cell
from examples.digits.scenes import SCENES, TASKS
from examples.digits.vision import encode_cells, feature_table, normalise
from examples.digits.warm_start import TraitHeads, losses_of
from vtriune.data.prompt_pool import ANSWER_SENTENCES, REASONING_SENTENCES


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out():
    return [row for task in TASKS for row in itertools.islice(rows(task, "test", 0, digit_pool("test")), 8)]


def test_the_shipped_folder_is_a_small_checkpoint_of_two_to_three_million_parameters(shipped):
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size <= 8e6
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json", "README.md"} <= {
        path.name for path in MODEL_FOLDER.iterdir()
    }
    assert 2e6 <= sum(parameter.numel() for parameter in shipped.parameters()) <= 3e6
    assert all(torch.isfinite(parameter).all() for parameter in shipped.parameters())


def test_the_shipped_tokenizer_is_the_one_the_code_builds(processor):
    assert processor.tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_the_model_has_one_embedding_per_token(shipped, processor):
    assert shipped.get_input_embeddings().weight.shape[0] == len(processor.tokenizer)
    assert shipped.lm_head.weight.shape[0] == len(processor.tokenizer)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_the_tokenizer_round_trips_any_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text


TOKENIZER = build_tokenizer()


@pytest.mark.parametrize("text", TEXT_TOKENS)
def test_tags_and_box_syntax_are_single_ordinary_tokens(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(ids) == 1
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_disappear_when_skipped():
    ids = TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert sorted(ids) == list(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == ""


def test_prompts_are_at_most_forty_text_tokens_and_pool_sentences_are_made_of_words():
    rng = random.Random(0)
    for _ in range(50):
        for question in itertools.chain.from_iterable(SCENES[task](rng).questions for task in TASKS):
            assert len(TOKENIZER.encode(question.prompt)) <= 40
    for sentence in REASONING_SENTENCES + ANSWER_SENTENCES:
        assert len(TOKENIZER.encode(" " + sentence)) <= 2 * len(sentence.split())


def test_image_tokens_equal_the_cells_of_the_grid(processor, held_out):
    for row in held_out:
        image = Image.open(io.BytesIO(row["images"][0]["bytes"]))
        inputs = processor(text=[chat_text(processor, row)], images=[image], return_tensors="pt")
        _, height, width = inputs["image_grid_thw"][0].tolist()
        assert (height * 14, width * 14) == (image.height, image.width)
        assert int((inputs["input_ids"] == IMAGE_PAD_ID).sum()) == height * width // 4 <= 16


def test_encoding_cells_alone_equals_the_tower_on_the_processed_image(shipped, processor):
    rng, pool = random.Random(3), digit_pool("test")
    inks = choose_ink(SCENES["counting"](rng).cells, pool, rng)
    image = Image.fromarray(draw(inks, pool)).convert("RGB")
    inputs = processor.image_processor(images=[image], return_tensors="pt")
    with torch.no_grad():
        whole = shipped.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        cells = torch.stack([normalise(draw_cell(ink, pool)) for line in inks for ink in line])
        torch.testing.assert_close(encode_cells(shipped.model.visual, cells), whole, atol=2e-5, rtol=1e-4)


def test_questions_packed_behind_one_image_have_the_losses_of_separate_sequences(processor):
    model = build(len(TOKENIZER), seed=1).eval()
    pool = digit_pool("test")
    table = feature_table(model.model.visual, pool)
    stream = RowStream(TOKENIZER, pool, Mixture(Noise()))
    packed = [stream.row(random.Random(seed)) for seed in range(3)]
    batch = collate(packed)
    with torch.no_grad():
        together, _ = losses_of(model, TraitHeads(model.config.text_config.hidden_size), table, batch)
        alone = [loss for row in packed for loss in separate_losses(model, table, row)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def separate_losses(model, table, row):
    """Losses of each question of a packed row as a sequence of its own, through transformers' own forward and positions."""
    prefix = torch.from_numpy(row.ids[row.segments == 0])
    num_rows, num_columns = (int(row.traits[:, axis].max()) + 1 for axis in (1, 2))
    for number in range(1, row.segments.max() + 1):
        ids = torch.cat([prefix, torch.from_numpy(row.ids[row.segments == number])])[None]
        targets = torch.from_numpy(row.targets[row.segments == number])
        positions, _ = model.model.get_rope_index(
            ids, (ids == IMAGE_PAD_ID).int(), image_grid_thw=torch.tensor([[1, 2 * num_rows, 2 * num_columns]])
        )
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[ids == IMAGE_PAD_ID] = table[torch.from_numpy(row.cells)]
        logits = model(inputs_embeds=embeds, position_ids=positions).logits[0, len(prefix) :]
        yield torch.nn.functional.cross_entropy(logits[targets >= 0], targets[targets >= 0], reduction="none")


def test_the_feature_table_has_a_row_for_every_cell_a_split_can_show():
    pool = digit_pool("test")
    stream = RowStream(TOKENIZER, pool, Mixture(Noise()))
    rng = random.Random(0)
    indices = {
        stream.cell_index(CellInk(rng.randrange(len(pool.ids)), rng.randrange(NUM_VARIANTS))) for _ in range(200)
    }
    assert min(indices) >= 2
    assert max(indices) < 2 + len(pool.ids) * NUM_VARIANTS
    assert [stream.cell_index(CellInk(position)) for position in (-1, -2)] == [0, 1]


def test_the_shipped_model_answers_in_format_and_is_sometimes_right(shipped, processor, held_out):
    torch.manual_seed(0)
    found = answers(shipped, processor, held_out, temperature=1.0)
    assert {answer.source for answer in found} == set(SOURCES.values())
    assert sum(answer.format for answer in found) / len(found) > 0.5
    assert 0.1 < sum(answer.reward for answer in found) / len(found) < 0.9

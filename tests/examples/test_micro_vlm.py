"""The micro model: its tokenizer, the shipped folder, and the warm start's short cuts against transformers' own forward."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from examples.digits.batches import Batch, Writer
from examples.digits.build import SOURCES, rows
from examples.digits.coordinates import around
from examples.digits.demonstrations import Hand, Noise, boxes_of, exercises, respond
from examples.digits.language import Vocabulary, response_losses
from examples.digits.measure import AutoModelForImageTextToText, AutoProcessor, answers, chat_text
from examples.digits.micro_vlm import (
    IMAGE_PAD_ID,
    MODEL_FOLDER,
    SPECIAL_TOKENS,
    TEXT_TOKENS,
    build,
    build_tokenizer,
    coordinate_texts,
)
from examples.digits.rendering import digit_pool, draw
from examples.digits.scenes import PERCEPTION, TASKS, compose
from examples.digits.streams import scenes
from examples.digits.vision import NOTHING, encode, grid_of, iou, owned, resized
from vtriune.data.prompt_pool import ANSWER_SENTENCES, REASONING_SENTENCES

TOKENIZER = build_tokenizer()
HAND = Hand(careful=0.6, small=0.02, large=0.15)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def held_out():
    return [row for task in TASKS for row in itertools.islice(rows(task, "test", 0), 8)]


def test_the_shipped_folder_is_a_small_checkpoint_of_two_to_six_million_parameters(shipped):
    assert (MODEL_FOLDER / "model.safetensors").stat().st_size <= 12e6
    assert {"config.json", "generation_config.json", "tokenizer.json", "preprocessor_config.json", "README.md"} <= {
        path.name for path in MODEL_FOLDER.iterdir()
    }
    assert 2e6 <= sum(parameter.numel() for parameter in shipped.parameters()) <= 6e6
    assert all(torch.isfinite(parameter).all() for parameter in shipped.parameters())


def test_the_shipped_tokenizer_is_the_one_the_code_builds(processor):
    assert processor.tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_the_model_has_one_embedding_per_token(shipped, processor):
    assert shipped.get_input_embeddings().weight.shape[0] == len(processor.tokenizer)
    assert shipped.lm_head.weight.shape[0] == len(processor.tokenizer)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_the_tokenizer_round_trips_any_text(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("text", TEXT_TOKENS)
def test_tags_and_box_syntax_are_single_ordinary_tokens(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(ids) == 1
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_every_edge_of_a_box_is_one_token_of_the_last_ones_in_order():
    rng, pool = random.Random(0), digit_pool("test")
    texts = coordinate_texts()
    first = len(TOKENIZER) - len(texts)
    assert TOKENIZER.convert_tokens_to_ids(texts) == list(range(first, len(TOKENIZER)))
    for _ in range(100):
        scene, questions = compose(rng.choice(PERCEPTION), pool, rng)
        for question in questions:
            told = [
                texts[token - first]
                for token in TOKENIZER.encode(respond(question, scene), add_special_tokens=False)
                if token >= first
            ]
            edges = [edge for _, box in boxes_of(question, scene) for edge in box]
            assert told == [f"{edge}," if place % 4 < 3 else str(edge) for place, edge in enumerate(edges)]


def test_special_tokens_disappear_when_skipped():
    ids = TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert sorted(ids) == list(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == ""


def test_prompts_are_short_and_pool_sentences_are_made_of_words():
    rng, pool = random.Random(0), digit_pool("train")
    for task in TASKS * 10:
        scene, questions = compose(task, pool, rng)
        for question in [*questions, *exercises(scene, rng)]:
            assert len(TOKENIZER.encode(question.prompt)) <= 24
    for sentence in REASONING_SENTENCES + ANSWER_SENTENCES:
        assert len(TOKENIZER.encode(" " + sentence)) <= 2 * len(sentence.split())


def test_the_image_processor_makes_the_grid_that_the_warm_start_trained_on(processor):
    for scene in random_scenes(30):
        picture = Image.fromarray(draw(scene, random.Random(0))).convert("RGB")
        text = chat_text(processor, {"prompt": [{"content": "<image>Read the number."}]})
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
        _, height, width = inputs["image_grid_thw"][0].tolist()
        assert (height // 2, width // 2) == grid_of(scene)
        assert int((inputs["input_ids"] == IMAGE_PAD_ID).sum()) == height * width // 4 <= 36


def random_scenes(num):
    rng, pool = random.Random(3), digit_pool("test")
    return [compose(rng.choice(TASKS), pool, rng)[0] for _ in range(num)]


def test_the_warm_starts_features_are_those_of_the_processed_picture(shipped, processor):
    for scene in random_scenes(5):
        picture = Image.fromarray(draw(scene, random.Random(0))).convert("RGB")
        inputs = processor.image_processor(images=[picture], return_tensors="pt")
        with torch.no_grad():
            whole = shipped.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            features = encode(shipped.model.visual, resized(scene, random.Random(0))[None])[0]
        # Resizing rounds to whole grey levels in both, not always alike.
        torch.testing.assert_close(features, whole, atol=0.05, rtol=0.05)
        assert (features - whole).abs().mean() < 0.005


def test_a_token_owns_the_thing_whose_middle_it_covers():
    for scene in random_scenes(50):
        truth, (num_rows, num_columns) = owned(scene), grid_of(scene)
        assert truth.contents.shape == (num_rows * num_columns,)
        assert sorted(truth.tokens) == np.flatnonzero(truth.contents != NOTHING).tolist()
        for token, box in zip(truth.tokens, truth.boxes, strict=True):
            x, y = (box[0] + box[2]) / 2000 * num_columns, (box[1] + box[3]) / 2000 * num_rows
            assert abs(token % num_columns + 0.5 - x) < 0.51 > abs(token // num_columns + 0.5 - y)


def test_iou_is_the_textbooks():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 5, 9]])
    others = torch.tensor([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    torch.testing.assert_close(iou(boxes, others), torch.tensor([1.0, 1 / 3, 0.0, 0.0]))


def test_questions_packed_behind_one_picture_have_the_losses_of_separate_sequences():
    model = build(len(TOKENIZER), seed=1).eval()
    vocabulary = Vocabulary(model)
    vocabulary.write(model)
    asked = next(scenes("4", 3))
    writer = Writer(TOKENIZER, Noise(hand=HAND), random.Random(0))
    batch = writer.batch(asked)
    features = torch.randn(3, int((batch.ids[0] == IMAGE_PAD_ID).sum()), model.config.text_config.hidden_size)
    with torch.no_grad():
        together, _ = response_losses(model, vocabulary, features, batch, HAND)
        alone = torch.cat([separate_losses(model, features[row], batch, row, grid_of(asked[0][0])) for row in range(3)])
    is_edge = torch.zeros(len(together), dtype=torch.bool).index_fill(0, batch.edges_at, True)
    assert is_edge.sum() > 20
    torch.testing.assert_close(together[~is_edge], alone[~is_edge], atol=1e-4, rtol=1e-4)
    # An edge's loss is that of the hands' distribution, whatever was drawn.
    assert not torch.allclose(together[is_edge], alone[is_edge])


def separate_losses(model, features, batch: Batch, row, grid):
    """Losses of each question of a packed row as a sequence of its own, through transformers' own forward and positions."""
    length = batch.ids.shape[1]
    starts = (batch.ids[row] == TOKENIZER.convert_tokens_to_ids("<|vision_end|>")).nonzero()[:, 0].tolist()
    end = int((batch.mask[row, 0].sum(1) > 1).nonzero().max()) + 1
    prefix = batch.ids[row, : starts[0]]
    found = []
    for begin, stop in itertools.pairwise([*starts, end]):
        ids = torch.cat([prefix, batch.ids[row, begin:stop]])[None]
        positions, _ = model.model.get_rope_index(
            ids, (ids == IMAGE_PAD_ID).int(), image_grid_thw=torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
        )
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[ids == IMAGE_PAD_ID] = features
        logits = model(inputs_embeds=embeds, position_ids=positions).logits[0]
        learned = [at - row * length for at in batch.loss_at.tolist() if begin <= at - row * length < stop]
        places = torch.tensor(learned) - begin + len(prefix)
        found.append(torch.nn.functional.cross_entropy(logits[places], ids[0, places + 1], reduction="none"))
    return torch.cat(found)


def test_the_distribution_around_an_edge_is_a_normal_one_and_adds_up_to_one():
    found = around(torch.tensor([500.0, 0.0]), torch.tensor([10.0, 5.0])).double()
    torch.testing.assert_close(found.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)
    places = torch.arange(1001, dtype=torch.float64)
    assert float((found[0] * places).sum()) == pytest.approx(500, abs=1e-3)
    assert float((found[0] * (places - 500) ** 2).sum().sqrt()) == pytest.approx(10, rel=1e-3)


def test_the_shipped_model_answers_in_format_and_is_sometimes_right(shipped, processor, held_out):
    torch.manual_seed(0)
    found = answers(shipped, processor, held_out, temperature=1.0)
    assert {answer.source for answer in found} == set(SOURCES.values())
    assert sum(answer.format for answer in found) / len(found) > 0.5
    assert 0.1 < sum(answer.reward for answer in found) / len(found) < 0.9

"""The micro vision-language model: Qwen2.5-VL's architecture at four million parameters, or one, with a tokenizer of its own.

`build(seed)` gives a random model, `build_tokenizer()` its tokenizer, `save(...)` writes the folder that transformers and vLLM load.
Called by the warm start and the tests.
"""

import json
import pathlib
import random
from typing import NamedTuple

from vtriune.torchvision_schemas import define_missing_schemas

define_missing_schemas()

import torch  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
)

from examples.digits.coordinates import NUM_COORDINATES  # noqa: E402
from examples.digits.demonstrations import exercises, respond  # noqa: E402
from examples.digits.rendering import digit_pool  # noqa: E402
from examples.digits.scenes import BOX_FORM, PERCEPTION, TASKS, compose  # noqa: E402
from vtriune.data.prompt_pool import ANSWER_SENTENCES, REASONING_SENTENCES  # noqa: E402

MODEL_FOLDER = pathlib.Path(__file__).parent / "model"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD_ID, IM_START_ID, IM_END_ID, VISION_START_ID, VISION_END_ID, IMAGE_PAD_ID, VIDEO_PAD_ID = range(len(SPECIAL_TOKENS))

# One token each, and ordinary text: decoding with skip_special_tokens keeps them.
TEXT_TOKENS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    '[{"bbox_2d":[',
    '],"label":"',
    '"},{"bbox_2d":[',
    '"}]',
    BOX_FORM,
)
# Coordinates are one token each: numbers with their comma, and those before a bracket, which belongs to the next text token. Other
# digits stand alone; words and punctuation keep their space.
SPLIT = r"\d{1,4}(?:,|$)| ?\d| ?[A-Za-z_']+| ?[^\sA-Za-z_'\d]+|\s"
NUM_MERGED_TOKENS = 1000
FIRST_LAST = 10
"""The smallest last coordinate with a token of its own: below, digits have theirs."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' or 'image' in c or 'image_url' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'text' or 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_corpus(seed: int = 0, num_scenes: int = 100) -> list[str]:
    """The texts whose words become single tokens: prompts, demonstrations without boxes, and the prompt pool."""
    rng, pool = random.Random(seed), digit_pool("train")
    fixed = [*REASONING_SENTENCES, *ANSWER_SENTENCES, "user\n", "assistant\n", "system\n"]
    texts = [" " + text for text in fixed] * 20 + fixed * 20
    for task in TASKS:
        for _ in range(num_scenes):
            scene, questions = compose(task, pool, rng)
            for question in [*questions, *exercises(scene, rng)]:
                texts.append(question.prompt.replace(BOX_FORM, ""))
                texts.append(question.thought if question.task in PERCEPTION else respond(question, scene))
    return texts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the corpus's words, with Qwen's special tokens and chat template.

    Its last tokens are the coordinates: "0," to "1000,", then FIRST_LAST to "1000".
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_MERGED_TOKENS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(tokenizer_corpus(), trainer)
    return Qwen2TokenizerFast(
        tokenizer_object=_with_whole_tokens(bpe),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def coordinate_texts() -> list[str]:
    """The texts of the coordinate tokens, in the order of their ids."""
    return [f"{value}," for value in range(NUM_COORDINATES)] + [str(n) for n in range(FIRST_LAST, NUM_COORDINATES)]


def _with_whole_tokens(bpe: Tokenizer) -> Tokenizer:
    """The tokenizer with TEXT_TOKENS and then the coordinates, which are found whole and not by merges."""
    state = json.loads(bpe.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {text: len(vocabulary) + place for place, text in enumerate([*TEXT_TOKENS, *coordinate_texts()])}
    state["model"]["ignore_merges"] = True
    whole = Tokenizer.from_str(json.dumps(state))
    whole.add_tokens([AddedToken(text, normalized=False, special=False) for text in TEXT_TOKENS])
    return whole


class Size(NamedTuple):
    """Widths and depths; heads are 32 wide in both halves."""

    width: int
    feed_forward: int
    num_layers: int
    num_key_value_heads: int
    vision_width: int
    vision_feed_forward: int
    vision_depth: int


SIZES = {"micro": Size(192, 512, 4, 2, 128, 384, 4), "tiny": Size(96, 192, 3, 1, 64, 128, 2)}
"""micro: the demo's, 4.0 M parameters; tiny: the tests', 1.0 M."""


def model_config(vocab_size: int, size: Size = SIZES["micro"]) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL, small. Every block of the tower attends to the whole picture."""
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": size.width,
            "intermediate_size": size.feed_forward,
            "num_hidden_layers": size.num_layers,
            "num_attention_heads": size.width // 32,
            "num_key_value_heads": size.num_key_value_heads,
            "vocab_size": vocab_size,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": IM_END_ID,
            "pad_token_id": PAD_ID,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_feed_forward,
            "num_heads": size.vision_width // 32,
            "out_hidden_size": size.width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(size.vision_depth)),
        },
        image_token_id=IMAGE_PAD_ID,
        video_token_id=VIDEO_PAD_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def build(vocab_size: int, seed: int, size: Size = SIZES["micro"]) -> Qwen2_5_VLForConditionalGeneration:
    """A random float32 model; embeddings are wider than transformers' default so that words and image features start alike."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(model_config(vocab_size, size)).float()
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.3)
    return model


def save(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: pathlib.Path) -> None:
    """Write weights in bfloat16, configuration, tokenizer and image processor to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen2_5_VLForConditionalGeneration(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=IM_END_ID, pad_token_id=PAD_ID, do_sample=True, temperature=1.0, max_new_tokens=96
    )
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 784,
        "max_pixels": 28224,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

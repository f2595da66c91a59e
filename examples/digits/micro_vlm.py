"""The micro vision-language model: Qwen2.5-VL's architecture at about 2.5 M parameters, with a tokenizer of its own.

`build(seed)` gives a random model, `build_tokenizer()` its tokenizer, `save(...)` writes the folder that transformers and vLLM load.
Called by the warm start and the tests.
"""

import json
import pathlib
import random

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

from examples.digits.demonstrations import reading_exercises, respond  # noqa: E402
from examples.digits.scenes import SCENES  # noqa: E402
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
    '[{"bbox_2d": [',
    ', {"bbox_2d": [',
    '], "label": "',
    '"}]',
    '"}',
    "x1, y1, x2, y2",
    '], "label": name}]',
)
# Coordinates (numbers before a comma, a bracket or a text token) stay whole, other digits stand alone; words and punctuation keep
# their space.
SPLIT = r" ?\d{1,3}(?=[,\]])| \d{2,3}$| ?\d| ?[A-Za-z_']+| ?[^\sA-Za-z_'\d]+|\s"
NUM_MERGED_TOKENS = 1100
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' or 'image' in c or 'image_url' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'text' or 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_corpus(seed: int = 0, num_scenes: int = 300) -> list[str]:
    """The texts whose words become single tokens: prompts, demonstrations, exercises, coordinates and the prompt pool."""
    rng = random.Random(seed)
    coordinates = ", ".join(str(14 * i) for i in range(9))
    fixed = [
        *REASONING_SENTENCES,
        *ANSWER_SENTENCES,
        "user\n",
        "assistant\n",
        "system\n",
        f"[{coordinates}]",
        f"x, {coordinates}]",
    ]
    texts = [" " + text for text in fixed] * 20 + fixed * 20
    for scene_of in SCENES.values():
        for _ in range(num_scenes):
            scene = scene_of(rng)
            for question in scene.questions:
                texts += [question.prompt, respond(question)]
            texts += [text for exercise in reading_exercises(scene.cells, rng) for text in exercise]
    return texts


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the corpus's words, with Qwen's special tokens and chat template."""
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
    bpe.add_tokens([AddedToken(text, normalized=False, special=False) for text in TEXT_TOKENS])
    return Qwen2TokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def model_config(vocab_size: int) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL, small. Vision attention is windowed to one language-model token (28 px): a cell is encoded by itself."""
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": IM_END_ID,
            "pad_token_id": PAD_ID,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 192,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 28,
            "fullatt_block_indexes": [],
        },
        image_token_id=IMAGE_PAD_ID,
        video_token_id=VIDEO_PAD_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def build(vocab_size: int, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A random float32 model; embeddings are wider than transformers' default so that words and image features start alike."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(model_config(vocab_size)).float()
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
        "max_pixels": 25088,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

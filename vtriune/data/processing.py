"""The one owner of preprocessing: sample → chat-templated text, resized images, token ids, pixel features.

The generator asks for `prepare` and `prompt_ids_for_engine` (vLLM expands the pads itself), the learner for `features`,
the checks at load for `length_problem`. Both sides hand the same prepared images to the same Hugging Face image processor exactly
once, under the same pixel bounds (`mm_processor_kwargs`), and `check_expansion` compares what came out.

    sample ──prepare──▶ Prompt(text with one pad per image, RGB images on the patch grid)
                          ├─ prompt_ids_for_engine ─▶ [… <pad> …]           one id per image, for vLLM
                          └─ features ─────────────▶ [… <pad>×16 …], pixel_values, image_grid_thw

Importing this module loads nothing heavy. A Preprocessor loads the tokenizer (two seconds); the image processor, which brings torch and
torchvision along, is loaded by the first call of `features`.
"""

import hashlib
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtriune.data.patch_grid import PatchGrid, read_patch_grid
from vtriune.data.prompt_pool import ANSWER_SENTENCES, REASONING_SENTENCES, append_cot
from vtriune.data.schema import IMAGE_MARKER, DataError, Sample, Turn

_LONGEST_SENTENCES = f" {max(REASONING_SENTENCES, key=len)} {max(ANSWER_SENTENCES, key=len)}"


@dataclass(frozen=True, eq=False, slots=True)
class Prompt:
    """What both sides make their inputs of. `text` holds exactly one image pad per image of `images`, in order."""

    text: str
    images: list[Image.Image]
    """RGB, sides multiples of patch_size · merge_size, area within [min_pixels, max_pixels]."""
    where: str
    """Names the sample in errors."""


@dataclass(frozen=True, eq=False, slots=True)
class PromptFeatures:
    """Learner's input of one prompt of P tokens with N images."""

    prompt_ids: np.ndarray
    """int32 (P,), one pad id per merged image token"""
    pixel_values: np.ndarray
    """float32 (num_patches, patch_dim), patches of all images; (0, patch_dim) without images"""
    image_grid_thw: np.ndarray
    """int64 (N, 3): frames, patch rows, patch columns"""


class Preprocessor:
    """Tokenizer, chat template and image processor of one model folder, under fixed pixel bounds.

    model_path        a Hugging Face folder with tokenizer, chat template and (for images) processor
    min/max_pixels    bounds of an image's area after resizing, px²
    max_prompt_tokens longest prompt, image tokens included; a longer one is refused, never truncated
    Raises DataError when the folder holds no usable processor.
    """

    def __init__(self, model_path: str | Path, min_pixels: int, max_pixels: int, max_prompt_tokens: int) -> None:
        self.model_path = str(model_path)
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        self.max_prompt_tokens = max_prompt_tokens
        folder = Path(self.model_path)
        self._tokenizer = _load_tokenizer(folder)
        self._grid = read_patch_grid(folder, min_pixels, max_pixels)
        self._image_token: str = getattr(self._tokenizer, "image_token", "<|image_pad|>")
        self._video_token: str = getattr(self._tokenizer, "video_token", "<|video_pad|>")
        self.image_token_id: int = self._id_of(self._image_token)
        self.video_token_id: int = self._id_of(self._video_token)
        _check_ids_of_config(folder, self.image_token_id, self.video_token_id)
        self.end_token_ids: list[int] = _end_ids(folder, self._tokenizer.eos_token_id)
        """Ids that end a response: the tokenizer's end and those of generation_config.json."""

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer, as transformers loads it."""
        return self._tokenizer

    @property
    def pad_token_ids(self) -> list[int]:
        """Ids of the image and video pads that exist in the vocabulary: a response must not contain them."""
        return [token for token in (self.image_token_id, self.video_token_id) if token >= 0]

    def mm_processor_kwargs(self) -> dict[str, Any]:
        """What vLLM's `mm_processor_kwargs` must be for its image processor to resize as ours does."""
        return {"size": self._size()} if self._grid is not None else {}

    def prepare(self, sample: Sample, prompt_seed: int | None = None) -> Prompt:
        """Text and images of `sample`; `prompt_seed` draws the prompt-pool sentences of a mathverify sample, None adds none.

        Raises DataError for a broken image, a marker count that differs from the images, or a prompt over the limit.
        """
        where = _where(sample)
        turns = sample.prompt
        if prompt_seed is not None and sample.reward.verifier == "mathverify":
            last = turns[-1]
            turns = [*turns[:-1], Turn(last.role, append_cot(last.content, random.Random(prompt_seed)))]
        images = [
            self._resized(_decode(data, f"{where}images[{index}]"), where) for index, data in enumerate(sample.images)
        ]
        prompt = Prompt(self._text(turns, len(images), where), images, where)
        length = self.num_tokens(prompt)
        if length > self.max_prompt_tokens:
            raise DataError(where + _too_long(length, self.max_prompt_tokens))
        return prompt

    def prompt_ids_for_engine(self, prompt: Prompt) -> list[int]:
        """Token ids with one pad per image; vLLM replaces each by as many pads as the image has merged tokens."""
        ids: list[int] = self._tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
        num_pads = ids.count(self.image_token_id)
        if num_pads != len(prompt.images):
            raise DataError(
                f"{prompt.where}the prompt tokenizes to {num_pads} image pads for {len(prompt.images)} images; "
                f"its text must not contain {self._image_token}"
            )
        return ids

    def features(self, prompt: Prompt) -> PromptFeatures:
        """Expanded ids, patches and grids of `prompt`; see PromptFeatures for shapes.

        Raises DataError when the image processor makes other patches of an image than its size asks for.
        """
        ids, counts = self.prompt_ids_for_engine(prompt), self._image_token_counts(prompt)
        if not prompt.images:
            patch_dim = 0 if self._grid is None else self._grid.patch_dim
            return PromptFeatures(
                np.asarray(ids, np.int32), np.zeros((0, patch_dim), np.float32), np.zeros((0, 3), np.int64)
            )
        batch = self._image_processor(images=prompt.images, size=self._size(), return_tensors="np")
        grid = np.asarray(batch["image_grid_thw"], np.int64)
        pixels = np.ascontiguousarray(batch["pixel_values"], np.float32)
        merge = self._image_processor.merge_size**2
        if (grid.prod(axis=1) // merge).tolist() != counts or sum(counts) * merge != len(pixels):
            raise DataError(
                f"{prompt.where}the image processor made {len(pixels)} patches and grids {grid.tolist()} of images of "
                f"{[image.size for image in prompt.images]} px, which ask for {counts} merged tokens"
            )
        return PromptFeatures(self._expand(ids, counts), pixels, grid)

    def num_tokens(self, prompt: Prompt) -> int:
        """P of the expanded prompt, without touching pixels."""
        ids = self.prompt_ids_for_engine(prompt)
        return len(ids) + sum(self._image_token_counts(prompt)) - len(prompt.images)

    def check_expansion(self, prompt: Prompt, engine_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Our expanded ids, int32 (P,), when the engine's equal them; DataError naming the first difference otherwise."""
        ours = self._expand(self.prompt_ids_for_engine(prompt), self._image_token_counts(prompt))
        theirs = np.asarray(engine_ids, np.int32)
        if np.array_equal(ours, theirs):
            return ours
        shared = min(len(ours), len(theirs))
        differing = np.flatnonzero(ours[:shared] != theirs[:shared])
        first = int(differing[0]) if len(differing) else shared
        raise DataError(
            f"{prompt.where}the engine expanded the prompt to {len(theirs)} ids with "
            f"{int((theirs == self.image_token_id).sum())} image pads, ours has {len(ours)} with "
            f"{int((ours == self.image_token_id).sum())}; they differ from position {first}. "
            f"Start the engine with mm_processor_kwargs={self.mm_processor_kwargs()}"
        )

    def length_problem(self, sample: Sample, prompt_pool: bool) -> str | None:
        """Why `prepare` could refuse `sample` for its markers, image sizes or length; None when no prompt seed makes it.

        From image headers alone, and only a prompt whose UTF-8 length could exceed the limit is tokenized: no token is shorter
        than a byte, and normalisation grows text at most threefold.
        """
        try:
            bound = self._token_bound(sample, prompt_pool)
        except DataError as error:
            return str(error)
        return _too_long(bound, self.max_prompt_tokens) if bound > self.max_prompt_tokens else None

    @property
    def identity(self) -> str:
        """Names everything that `length_problem` depends on besides the sample."""
        folder = Path(self.model_path)
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
        digest = hashlib.sha256(f"{self._size()} {self.max_prompt_tokens}".encode())
        for path in (folder / name for name in names):
            digest.update(path.read_bytes() if path.is_file() else b"-")
        return digest.hexdigest()

    def _token_bound(self, sample: Sample, prompt_pool: bool) -> int:
        turns = sample.prompt
        if prompt_pool and sample.reward.verifier == "mathverify":
            turns = [*turns[:-1], Turn(turns[-1].role, turns[-1].content + _LONGEST_SENTENCES)]
        text = self._text(turns, len(sample.images), "")
        sizes = [_header_size(data, f"images[{index}]") for index, data in enumerate(sample.images)]
        of_images = sum(self._num_tokens_of(*size) for size in sizes) - len(sizes)
        bound = 3 * len(text.encode()) + of_images
        if bound <= self.max_prompt_tokens:
            return bound
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"]) + of_images

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """A response's text: everything sampled, special tokens included, but for the end tokens at its end."""
        ids = [int(token) for token in token_ids]
        while ids and ids[-1] in self.end_token_ids:
            ids.pop()
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _text(self, turns: Sequence[Turn], num_images: int, where: str) -> str:
        num_markers = sum(turn.content.count(IMAGE_MARKER) for turn in turns if turn.role == "user")
        if num_markers != num_images:
            raise DataError(f"{where}the prompt has {num_markers} {IMAGE_MARKER} markers for {num_images} images")
        messages = [{"role": turn.role, "content": _content(turn)} for turn in turns]
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if text.count(self._image_token) != num_images or self._video_token in text:
            raise DataError(
                f"{where}the templated prompt has {text.count(self._image_token)} image pads for {num_images} images, "
                f"or a video pad; its text must not contain {self._image_token} or {self._video_token}"
            )
        return text

    def _expand(self, ids: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """int32 (P,): the i-th pad of `ids` repeated counts[i] times."""
        array = np.asarray(ids, np.int32)
        repeats = np.ones(len(array), np.int64)
        repeats[array == self.image_token_id] = counts
        return np.repeat(array, repeats)

    def _size(self) -> dict[str, int]:
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    def _resized(self, image: Image.Image, where: str) -> Image.Image:
        """One resampling, from the file's pixels straight to the patch grid.

        Scaling into the bounds first and letting the processor round to the grid afterwards would resample twice.
        """
        try:
            size = self._needed_grid().size(*image.size)
        except DataError as error:
            raise DataError(f"{where}{error}") from error
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def _image_token_counts(self, prompt: Prompt) -> list[int]:
        """Merged tokens of each image, as the image processor will make them of the prepared ones."""
        return [self._needed_grid().num_tokens(*image.size) for image in prompt.images]

    def _num_tokens_of(self, width: int, height: int) -> int:
        """Merged tokens of an image as the file has it."""
        grid = self._needed_grid()
        return grid.num_tokens(*grid.size(width, height))

    def _needed_grid(self) -> PatchGrid:
        if self._grid is None:
            raise DataError(
                f"the sample has images, but {self.model_path} is no vision model; use a vision-language model"
            )
        return self._grid

    @cached_property
    def _image_processor(self) -> Any:
        from vtriune.torchvision_schemas import define_missing_schemas

        define_missing_schemas()
        from transformers import AutoImageProcessor

        factory: Any = AutoImageProcessor
        try:
            return factory.from_pretrained(self.model_path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{self.model_path}: no image processor can be loaded ({error}); save the model's there"
            ) from error

    def _id_of(self, token: str) -> int:
        found = self._tokenizer.convert_tokens_to_ids(token)
        return -1 if found is None or found == self._tokenizer.unk_token_id else int(found)


def _load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer with its chat template.

    The class is taken by the name that the folder gives: AutoTokenizer finds the same one, after importing every model's code.
    """
    import transformers

    settings = folder / "tokenizer_config.json"
    name = json.loads(settings.read_text()).get("tokenizer_class") if settings.is_file() else None
    factory: Any = getattr(transformers, name or "", None) or transformers.AutoTokenizer
    try:
        tokenizer = factory.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no tokenizer can be loaded ({error}); save the model's tokenizer there") from error
    of_processor = folder / "chat_template.json"
    if not tokenizer.chat_template and of_processor.is_file():
        tokenizer.chat_template = json.loads(of_processor.read_text()).get("chat_template")
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: has no chat template; save the model's chat_template.jinja beside its tokenizer")
    return tokenizer


def _check_ids_of_config(folder: Path, image_token_id: int, video_token_id: int) -> None:
    """The model must expand the very ids that the tokenizer writes."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    for key, ours in (("image_token_id", image_token_id), ("video_token_id", video_token_id)):
        if config.get(key, ours) != ours:
            raise DataError(
                f"{path}: {key} is {config[key]}, but the folder's tokenizer says {ours}; one of them is of another model"
            )


def _end_ids(folder: Path, of_tokenizer: int | None) -> list[int]:
    path = folder / "generation_config.json"
    of_model = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ends = {of_tokenizer, *(of_model if isinstance(of_model, list) else [of_model])}
    return sorted(token for token in ends if token is not None)


def _content(turn: Turn) -> str | list[dict[str, str]]:
    """Text and images of a user turn in the chat template's form; turns without images stay text."""
    if turn.role != "user" or IMAGE_MARKER not in turn.content:
        return turn.content
    first, *rest = turn.content.split(IMAGE_MARKER)
    parts = [{"type": "text", "text": first}]
    for text in rest:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    return [part for part in parts if part.get("text") != ""]


def _decode(data: bytes, where: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files.
        raise DataError(f"{where} cannot be decoded ({type(error).__name__}: {error})") from error


def _header_size(data: bytes, where: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:
        # As in _decode: a damaged header raises whatever its decoder happens to raise.
        raise DataError(f"{where} cannot be opened ({type(error).__name__}: {error})") from error


def _too_long(length: int, limit: int) -> str:
    return f"the prompt has {length} tokens, images included; data.max_prompt_tokens is {limit}"


def _where(sample: Sample) -> str:
    name = f"sample {sample.sample_id!r} of {sample.source}" if sample.sample_id else f"a sample of {sample.source}"
    return f"{name}: " if sample.row < 0 else f"row {sample.row} ({name}): "

"""The one owner of preprocessing: sample → chat-templated text, token ids, resized images, pixel features.

A process calls `prepare` once per group; what comes back carries the ids, made once, and makes images and pixels of them when they are
read. Both sides hand the same images to the same Hugging Face image processor exactly once, under the same pixel bounds
(`mm_processor_kwargs`), and `check_expansion` compares what came out. The checks at load ask `prompt_lengths`.

    sample ──prepare──▶ Prompt ── engine_ids  [… <pad> …]     one per image: vLLM expands them itself
                               ── prompt_ids  [… <pad>×16 …]  one per merged token: what the model sees, what the learner trains on
                               ── images       RGB on the patch grid, decoded at the first read
                               ── pixel_values patches, for the learner's vision tower

Importing this module loads nothing heavy. A Preprocessor loads the tokenizer (two seconds); the image processor, which brings torch and
torchvision along, is loaded by the first read of `pixel_values`.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from verifiers import ImageSize
from verifiers.texts import Decoder, without_ends
from vtriune.data import pictures
from vtriune.data.patch_grid import PatchGrid, read_json, read_patch_grid
from vtriune.data.prompt_pool import ANSWER_SENTENCES, REASONING_SENTENCES, append_cot
from vtriune.data.schema import IMAGE_MARKER, DataError, Sample, Turn

_LONGEST_SENTENCES = f" {max(REASONING_SENTENCES, key=len)} {max(ANSWER_SENTENCES, key=len)}"


@dataclass(frozen=True, eq=False)
class Prompt:
    """What both sides make their inputs of: P tokens and N images. Made by `Preprocessor.prepare`."""

    text: str
    """Exactly one image pad per image, in order."""
    engine_ids: list[int]
    """One pad id per image."""
    prompt_ids: np.ndarray
    """int32 (P,), one pad id per merged image token"""
    image_grid_thw: np.ndarray
    """int64 (N, 3): frames, patch rows, patch columns"""
    image_sizes: list[ImageSize]
    """Of each image as it is displayed in the data, turned by its orientation, and as the model sees it: then multiples of
    patch_size · merge_size, area within the pixel bounds."""
    where: str
    """Names the sample in errors."""
    encoded: list[bytes] = field(repr=False)
    preprocessor: "Preprocessor" = field(repr=False)

    @cached_property
    def images(self) -> list[Image.Image]:
        """RGB, of their resized sizes; DataError for a broken one.

        One resampling, from the file's pixels straight to the patch grid: scaling into the bounds first and letting the image
        processor round to the grid afterwards would resample twice.
        """
        images = []
        for index, (data, size) in enumerate(zip(self.encoded, self.image_sizes, strict=True)):
            try:
                image = pictures.read(data)
            except DataError as error:
                raise DataError(f"{self.where}images[{index}] {error}") from error
            images.append(image if size.resized == image.size else image.resize(size.resized, Image.Resampling.BICUBIC))
        return images

    @property
    def pixel_values(self) -> np.ndarray:
        """float32 (num_patches, patch_dim), patches of all images; (0, patch_dim) without images. Made anew by each read: they
        take eight times the images' memory. DataError when the image processor makes other patches than the grid says."""
        return self.preprocessor.patches(self)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes once its images are decoded."""
        decoded = sum(3 * size.resized[0] * size.resized[1] for size in self.image_sizes)
        return self.prompt_ids.nbytes + sum(map(len, self.encoded)) + decoded


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
        self.tokenizer = _load_tokenizer(folder)
        self._grid = read_patch_grid(folder, min_pixels, max_pixels)
        self._image_token: str = getattr(self.tokenizer, "image_token", "<|image_pad|>")
        self._video_token: str = getattr(self.tokenizer, "video_token", "<|video_pad|>")
        self.image_token_id: int = self._id_of(self._image_token)
        self.video_token_id: int = self._id_of(self._video_token)
        _check_ids_of_config(folder, self.image_token_id, self.video_token_id)
        self.end_token_ids: list[int] = _end_ids(folder, self.tokenizer.eos_token_id)
        """Ids that end a response: the tokenizer's end and those of generation_config.json."""

    @property
    def pad_token_ids(self) -> list[int]:
        """Ids of the image and video pads that exist in the vocabulary: a response must not contain them."""
        return [token for token in (self.image_token_id, self.video_token_id) if token >= 0]

    def mm_processor_kwargs(self) -> dict[str, Any]:
        """What vLLM's `mm_processor_kwargs` must be for its image processor to resize as ours does."""
        return {"size": self._bounds()} if self._grid is not None else {}

    def prepare(self, sample: Sample, prompt_seed: int | None = None) -> Prompt:
        """Ids and images of `sample`; `prompt_seed` draws the prompt-pool sentences of a mathverify sample, None adds none.

        Of the images only the headers are read. Raises DataError for one that cannot be opened, a marker count that differs from
        the images, or a prompt over the limit.
        """
        where = _where(sample)
        turns = sample.prompt
        if prompt_seed is not None and sample.reward.verifier == "mathverify":
            last = turns[-1]
            turns = [*turns[:-1], Turn(last.role, append_cot(last.content, random.Random(prompt_seed)))]
        sizes = self._sizes(sample.images, where)
        text = self._text(turns, len(sizes), where)
        engine_ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        num_pads = engine_ids.count(self.image_token_id)
        if num_pads != len(sizes):
            raise DataError(
                f"{where}the prompt tokenizes to {num_pads} image pads for {len(sizes)} images; "
                f"its text must not contain {self._image_token}"
            )
        prompt_ids = self._expand(engine_ids, self._token_counts(sizes))
        if len(prompt_ids) > self.max_prompt_tokens:
            raise DataError(where + _too_long(len(prompt_ids), self.max_prompt_tokens))
        return Prompt(text, engine_ids, prompt_ids, self._grids(sizes), sizes, where, sample.images, self)

    def patches(self, prompt: Prompt) -> np.ndarray:
        """`Prompt.pixel_values`."""
        if not prompt.images:
            return np.zeros((0, 0 if self._grid is None else self._grid.patch_dim), np.float32)
        batch = self._image_processor(images=prompt.images, size=self._bounds(), return_tensors="np")
        pixels = np.ascontiguousarray(batch["pixel_values"], np.float32)
        grids = np.asarray(batch["image_grid_thw"], np.int64)
        if not np.array_equal(grids, prompt.image_grid_thw) or len(pixels) != grids.prod(axis=1).sum():
            raise DataError(
                f"{prompt.where}the image processor made {len(pixels)} patches and grids {grids.tolist()} of images of "
                f"{[image.size for image in prompt.images]} px, which ask for grids {prompt.image_grid_thw.tolist()}"
            )
        return pixels

    def check_expansion(self, prompt: Prompt, engine_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """`prompt.prompt_ids` when the engine's equal them; DataError naming the first difference otherwise."""
        ours, theirs = prompt.prompt_ids, np.asarray(engine_ids, np.int32)
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

    def prompt_lengths(self, samples: Sequence[Sample], prompt_pool: bool) -> list[int | str]:
        """Tokens of each sample's prompt, image tokens included, as `prepare` would make them at their most; or why it would refuse the
        sample. Of images only the headers are read.

        prompt_pool  count the longest sentences of the pool into a mathverify prompt
        """
        texts, of_images = [], []
        found: list[int | str] = []
        for sample in samples:
            turns = sample.prompt
            if prompt_pool and sample.reward.verifier == "mathverify":
                turns = [*turns[:-1], Turn(turns[-1].role, turns[-1].content + _LONGEST_SENTENCES)]
            try:
                sizes = self._sizes(sample.images, "")
                text = self._text(turns, len(sizes), "")
            except DataError as error:
                found.append(str(error))
                continue
            texts.append(text)
            of_images.append(sum(self._token_counts(sizes)) - len(sizes))
            found.append(-1)
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        more = iter(of_images)
        lengths = [one if isinstance(one, str) else len(next(ids)) + next(more) for one in found]
        limit = self.max_prompt_tokens
        return [_too_long(one, limit) if isinstance(one, int) and one > limit else one for one in lengths]

    @property
    def identity(self) -> str:
        """Names everything that `prompt_lengths` depends on besides the samples."""
        folder = Path(self.model_path)
        names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json")
        digest = hashlib.sha256(f"{self._bounds()} {self.max_prompt_tokens}".encode())
        for path in (folder / name for name in names):
            digest.update(path.read_bytes() if path.is_file() else b"-")
        return digest.hexdigest()

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """A response's text: everything sampled, special tokens included, but for the end tokens at its end."""
        ids = without_ends([int(token) for token in token_ids], self.end_token_ids)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _text(self, turns: Sequence[Turn], num_images: int, where: str) -> str:
        num_markers = sum(turn.content.count(IMAGE_MARKER) for turn in turns if turn.role == "user")
        if num_markers != num_images:
            raise DataError(f"{where}the prompt has {num_markers} {IMAGE_MARKER} markers for {num_images} images")
        messages = [{"role": turn.role, "content": _content(turn)} for turn in turns]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
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

    def _bounds(self) -> dict[str, int]:
        """The pixel bounds in the image processors' words; both are areas, px²."""
        return {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}

    def image_sizes(self, sample: Sample) -> list[ImageSize]:
        """Of each of the sample's images, by its header; DataError for a broken one."""
        return self._sizes(sample.images, "")

    def _sizes(self, images: Sequence[bytes], where: str) -> list[ImageSize]:
        """Of each image, by its header."""
        sizes = []
        for index, data in enumerate(images):
            try:
                original = pictures.size(data)
            except DataError as error:
                raise DataError(f"{where}images[{index}] {error}") from error
            try:
                sizes.append(ImageSize(original, self._needed_grid().size(*original)))
            except DataError as error:
                raise DataError(f"{where}{error}") from error
        return sizes

    def _token_counts(self, sizes: Sequence[ImageSize]) -> list[int]:
        """Merged tokens of each image, as the image processor will make them of the resized ones."""
        return [self._needed_grid().num_tokens(*size.resized) for size in sizes]

    def _grids(self, sizes: Sequence[ImageSize]) -> np.ndarray:
        patch = 1 if self._grid is None else self._grid.patch_size
        grids = [(1, height // patch, width // patch) for width, height in (size.resized for size in sizes)]
        return np.array(grids, np.int64).reshape(-1, 3)

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
        found = self.tokenizer.convert_tokens_to_ids(token)
        return -1 if found is None or found == self.tokenizer.unk_token_id else int(found)


def response_decoder(model_path: str) -> Decoder | None:
    """What makes of a response's ids the text that `Preprocessor.decode` gives, without transformers; None for the rare tokenizer that
    is written in Python."""
    tokenizer = _load_tokenizer(Path(model_path))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    ends = _end_ids(Path(model_path), tokenizer.eos_token_id)
    return None if backend is None else Decoder(backend.to_str().encode(), ends)


def _load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer with its chat template.

    The class is taken by the name that the folder gives: AutoTokenizer finds the same one, after importing every model's code.
    """
    import transformers

    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    factory: Any = getattr(transformers, name or "", None) or transformers.AutoTokenizer
    try:
        tokenizer = factory.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: no tokenizer can be loaded ({error}); save the model's tokenizer there") from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    if not tokenizer.chat_template:
        raise DataError(f"{folder}: has no chat template; save the model's chat_template.jinja beside its tokenizer")
    return tokenizer


def _check_ids_of_config(folder: Path, image_token_id: int, video_token_id: int) -> None:
    """The model must expand the very ids that the tokenizer writes."""
    path = folder / "config.json"
    config = read_json(path)
    for key, ours in (("image_token_id", image_token_id), ("video_token_id", video_token_id)):
        if config.get(key, ours) != ours:
            raise DataError(
                f"{path}: {key} is {config[key]}, but the folder's tokenizer says {ours}; one of them is of another model"
            )


def _end_ids(folder: Path, of_tokenizer: int | None) -> list[int]:
    of_model = read_json(folder / "generation_config.json").get("eos_token_id")
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


def _too_long(length: int, limit: int) -> str:
    return f"the prompt has {length} tokens, images included; data.max_prompt_tokens is {limit}"


def _where(sample: Sample) -> str:
    name = f"sample {sample.sample_id!r} of {sample.source}" if sample.sample_id else f"a sample of {sample.source}"
    return f"{name}: " if sample.row < 0 else f"row {sample.row} ({name}): "

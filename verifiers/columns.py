"""Names under which a Parquet file holds scored responses: `verifiers.rescore` reads them, a run's archive is written under them."""

from typing import Any

from verifiers.types import ImageSize

RESPONSE = "text"
"""Null: see `verifiers.texts`."""
TOKEN_IDS = "token_ids"
SPEC = "reward_model"
"""JSON of a RewardSpec, or a struct like a data row's."""
SOURCE = "source"
PROGRESS = "progress"
"""Training progress in [0, 1] under which the row was scored; null: an evaluation."""
IMAGE_SIZES = "image_sizes"
"""Of the prompt's images, in order: list of {original, resized}, each (width, height) in px."""
OPTIONS = "reward_options"
"""Key of the file's metadata: JSON of the RewardOptions."""
TOKENIZER = "tokenizer"
"""Key of the file's metadata: which file beside it decodes the texts that it leaves out."""


def sizes_of(value: list[dict[str, Any]] | None) -> list[ImageSize]:
    """What a row of IMAGE_SIZES says; nothing where it is null."""
    return [ImageSize(tuple(size["original"]), tuple(size["resized"])) for size in value or ()]

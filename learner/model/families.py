"""The table of model families: where each one keeps ViT, connector and language model. Adding a family is adding a row."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn


class UnknownModel(ValueError):
    """A model type outside the table."""


@dataclass(frozen=True, slots=True)
class Family:
    """Attribute paths inside the `*ForConditionalGeneration` or `*ForCausalLM` module."""

    language_model: str
    """The decoder without its output layer; its `layers` are the sharded blocks."""
    visual: str | None
    """The vision tower; its `blocks` are sharded. None: text only."""
    connector: tuple[str, ...]
    """Parameter-name prefixes below `visual` that belong to the connector."""
    num_position_axes: int
    """3: M-RoPE (temporal, height, width). 1: plain rotary positions."""
    has_deepstack: bool = False
    """The tower also yields features that are added to the first decoder layers' outputs at image tokens."""

    def module_of(self, name: str) -> str:
        """`vit`, `connector` or `llm` for a parameter name of the model."""
        if self.visual is None or not name.startswith(self.visual + "."):
            return "llm"
        rest = name[len(self.visual) + 1 :]
        return "connector" if rest.startswith(self.connector) else "vit"

    def layer_of(self, name: str) -> int | None:
        """Index of the decoder layer that a parameter belongs to, if any."""
        prefix = self.language_model + ".layers."
        return int(name[len(prefix) :].split(".", 1)[0]) if name.startswith(prefix) else None

    def decoder(self, model: nn.Module) -> Any:
        """The language model below `model`. Untyped: its class is transformers', another one in each family."""
        return attrgetter(self.language_model)(model)

    def blocks(self, model: nn.Module) -> Iterable[nn.Module]:
        """The modules that are sharded one by one: decoder layers and vision blocks, in the order they run."""
        if self.visual is not None:
            yield from attrgetter(self.visual)(model).blocks
        yield from self.decoder(model).layers


_VISION_LANGUAGE = "model.language_model"
_TABLE = {
    "qwen2_5_vl": Family(_VISION_LANGUAGE, "model.visual", ("merger.",), 3),
    "qwen3_vl": Family(_VISION_LANGUAGE, "model.visual", ("merger.", "deepstack_merger_list."), 3, has_deepstack=True),
    "qwen3": Family("model", None, (), 1),
}


def family_of(model_type: str) -> Family:
    """The row of `model_type` (`config.json`); raises UnknownModel."""
    if model_type not in _TABLE:
        raise UnknownModel(
            f"model type {model_type!r} is not supported; supported: {', '.join(_TABLE)}. A family is one row of {__name__}"
        )
    return _TABLE[model_type]

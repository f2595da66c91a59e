"""`model`: which model is trained, in which type, which of its modules."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from vtriune.config.sections.section import Section

Module = Literal["vit", "connector", "llm"]


class Model(Section, frozen=True):
    """The model's folder, and how the learner computes with it."""

    path: str = ""
    """Hugging Face folder with weights (safetensors), tokenizer and processor; under the same path on every node."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of computation, of generators' weights and of the exported model. The learner's own parameters and moments are float32
    either way: at a rate of 1e-6 an update is lost in bfloat16."""
    freeze: list[Module] = msgspec.field(default_factory=lambda: ["vit", "connector"])
    """Modules that are not trained. The default is the paper's: training ViT and language model together was unstable (arXiv
    2505.18129); image features of a frozen ViT and connector are computed once."""
    attention: Literal["auto", "flex", "cpu", "padded"] = "auto"
    """Kernel of the learner, under which a group's completions share their prompt. auto: flex on an accelerator, cpu elsewhere. padded:
    the prompt repeated for every completion, to compare with."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third more computation for much less memory."""
    compile: bool = False
    """torch.compile for each block of the language model: faster steps, a slower start."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What a learner on accelerators keeps in the host's memory: optimizer: Adam's moments. all: parameters and gradients too."""
    feature_cache: str = ""
    """Folder that keeps the image features of a frozen ViT and connector on disk, between runs too; empty: in memory only."""

    def problems(self) -> Iterable[str]:
        yield from self._folder_problems()
        is_tower_frozen = set(self.freeze) >= {"vit", "connector"}
        if self.feature_cache and not is_tower_frozen:
            yield (
                f"model.feature_cache: {self.feature_cache!r}, but features change while vit or connector is trained; "
                "freeze both, or leave feature_cache empty"
            )
        if is_tower_frozen and "llm" in self.freeze:
            yield "model.freeze: vit, connector and llm are all frozen; nothing would be trained"

    def _folder_problems(self) -> Iterable[str]:
        folder = Path(self.path)
        if not self.path or not folder.is_dir():
            yield f"model.path: {self.path!r} is no folder; name a Hugging Face model folder"
            return
        for what, names in (
            ("config.json", ["config.json"]),
            ("processor (preprocessor_config.json)", ["preprocessor_config.json", "processor_config.json"]),
            ("tokenizer (tokenizer.json)", ["tokenizer.json", "vocab.json", "tokenizer.model"]),
            ("*.safetensors weights", ["*.safetensors"]),
        ):
            if not any(file.is_file() for name in names for file in folder.glob(name)):
                yield f"model.path: {folder} has no {what}; save it there as transformers' save_pretrained does"

"""Random micro models, samples with images and transformers' own log-probs, for the tests of the actors."""

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image

from verifiers import RewardSpec
from vtriune.config import Config
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import Sample, Turn
from vtriune.messages import Lease, SampleHeader, SampleRef, Sampling
from vtriune.torchvision_schemas import define_missing_schemas

DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "model"
TEMPERATURE = 0.7


def write_model(folder: Path, *, tied: bool, seed: int = 0) -> Path:
    """A random float32 model of the digits example's shape, wide awake: outputs depend on images and words."""
    define_missing_schemas()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copy(DIGITS / name, folder / name)
    shutil.copy(DIGITS / "generation_config.json", folder / "generation_config.json")
    settings: Any = Qwen2_5_VLConfig.from_pretrained(DIGITS)
    settings.dtype = torch.float32
    settings.tie_word_embeddings = settings.text_config.tie_word_embeddings = tied
    settings.vision_config.depth = 2
    torch.manual_seed(seed)
    model: Any = Qwen2_5_VLForConditionalGeneration(settings).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.06 if "embed" not in name else 0.1 if tied else 0.3)
    model.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> Any:
    """transformers' model of `folder`, float32."""
    define_missing_schemas()
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def perturb(model: Any, seed: int, amount: float = 0.1) -> None:
    """Move every parameter by `amount` of its spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else torch.tensor(1.0)
            parameter += amount * spread * torch.randn(parameter.shape, generator=generator)


class Rows:
    """Samples by row, with a random image each (none where row % 4 == 3)."""

    fingerprint = "rows"

    def get(self, ref: SampleRef) -> Sample:
        assert ref.fingerprint == self.fingerprint
        rng = np.random.default_rng(ref.row)
        images = [] if ref.row % 4 == 3 else [_png(rng, 56 if ref.row % 2 else 84)]
        text = "<image>" * len(images) + f"count the digits in the image: {ref.row}"
        spec = RewardSpec(ground_truth=str(ref.row), verifier="mathverify")
        return Sample(ref.row, "rows", [Turn("user", text)], images, spec, "counting", str(ref.row))


def _png(rng: np.random.Generator, side: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def settings(folder: Path, **sections: dict[str, Any]) -> Config:
    """A configuration for the engine of `folder`'s model."""
    tree: dict[str, Any] = {
        "cluster": {
            "generators": {"threads": 1, "max_sequences": 32, "kv_cache_gib": 0.02, "max_model_len": 256},
        },
        "model": {"path": str(folder), "dtype": "float32"},
        "data": {"min_pixels": 784, "max_pixels": 25088, "max_prompt_tokens": 160},
        "sampling": {"temperature": TEMPERATURE, "max_tokens": 24},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return msgspec.convert(tree, Config)


def preprocessor_of(config: Config) -> Preprocessor:
    data = config.data
    return Preprocessor(config.model.path, data.min_pixels, data.max_pixels, data.max_prompt_tokens)


def lease(group_id: int, row: int, num_completions: int = 2, *, max_tokens: int = 24, **sampling: Any) -> Lease:
    sampling.setdefault("temperature", TEMPERATURE)
    sample = Rows().get(SampleRef(Rows.fingerprint, row))
    return Lease(
        group_id,
        0,
        SampleRef(Rows.fingerprint, row),
        SampleHeader(sample.source, sample.reward, sample.sample_id, "rows.parquet", row),
        num_completions,
        Sampling(max_tokens=max_tokens, **sampling),
    )


def oracle(
    model: Any,
    preprocessor: Preprocessor,
    row: int,
    response: Sequence[int] | np.ndarray,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """transformers' log-probs of `response` after the row's prompt, pads masked, float64 (T,)."""
    prompt = preprocessor.prepare(Rows().get(SampleRef(Rows.fingerprint, row)))
    ids = torch.tensor([[*prompt.prompt_ids.tolist(), *(int(token) for token in response)]])
    extra: dict[str, Any] = {}
    if len(prompt.image_grid_thw):
        extra = {
            "pixel_values": torch.from_numpy(prompt.pixel_values),
            "image_grid_thw": torch.from_numpy(prompt.image_grid_thw),
            "mm_token_type_ids": (ids == preprocessor.image_token_id).int(),
        }
    with torch.no_grad():
        logits = model(input_ids=ids, **extra).logits[0, len(prompt.prompt_ids) - 1 : -1].double()
    logits[:, preprocessor.pad_token_ids] = -torch.inf
    scores = torch.log_softmax(logits / (temperature or 1.0), -1)
    return scores.gather(1, ids[0, len(prompt.prompt_ids) :, None])[:, 0].numpy()


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]

"""Small random models, prompts with images and scored groups for the learner's tests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from learner.model.build import build_policy, materialise
from learner.model.policy import Policy
from verifiers import RewardSpec, Verdict
from vtriune.config import Config
from vtriune.config.tree import Model
from vtriune.messages import Group, Lease, SampleHeader, SampleRef, Sampling, ScoredGroup, Trajectory, VersionSpan

IMAGE, VIDEO, START, END, VOCAB = 4, 5, 2, 3, 96


def write_model(
    folder: Path, kind: str = "qwen2_5_vl", *, tied: bool = True, seed: int = 0, num_layers: int = 2
) -> Path:
    """A random model of family `kind` in Hugging Face format; weights large enough that outputs depend on inputs.

    `num_layers` is that of the decoder and of the vision tower.
    """
    from vtriune.torchvision_schemas import define_missing_schemas

    define_missing_schemas()
    import transformers

    torch.manual_seed(seed)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}, "initializer_range": 0.15,
    }  # fmt: skip
    vision = {
        "depth": num_layers, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.15,
    }  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    if kind == "qwen2_5_vl":
        window = {"window_size": 16, "fullatt_block_indexes": [num_layers - 1]}
        config: Any = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config={**vision, **window}, tie_word_embeddings=tied, **ids
        )
        model: Any = transformers.Qwen2_5_VLForConditionalGeneration(config)
    elif kind == "qwen3_vl":
        deep = {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
        text = {**text, "head_dim": 8}
        config = transformers.Qwen3VLConfig(
            text_config=text, vision_config={**vision, **deep}, tie_word_embeddings=tied, **ids
        )
        model = transformers.Qwen3VLForConditionalGeneration(config)
    else:
        text = {**text, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text))
    model.save_pretrained(folder)
    return folder


def make_policy(folder: Path, *, freeze: tuple[str, ...] = (), temperature: float = 1.0, **settings: Any) -> Policy:
    """An unsharded policy on the CPU, image and video pads blocked where the family has them."""
    section = Model(path=str(folder), dtype="float32", freeze=list(freeze), **settings)  # type: ignore[arg-type]
    policy = build_policy(section, torch.device("cpu"), temperature=temperature)
    materialise(policy, section, torch.device("cpu"))
    return policy


@dataclass(frozen=True)
class FakeFeatures:
    """What a Preprocessor would give."""

    prompt_ids: np.ndarray
    pixel_values: np.ndarray
    image_grid_thw: np.ndarray


@dataclass
class World:
    """Prompts by row; callable as the learner's `Source`. `grids[row]` lists the patch grids of the row's images."""

    features: list[FakeFeatures] = field(default_factory=list)

    def __call__(self, sample: SampleRef, prompt_seed: int | None) -> FakeFeatures:
        return self.features[sample.row]

    def add(self, rng: np.random.Generator, num_text: int, grids: list[tuple[int, int]]) -> int:
        """A prompt of `num_text` text tokens with images of the given patch rows × columns spread over it; returns its row."""
        parts = np.array_split(rng.integers(6, VOCAB, num_text), len(grids) + 1)
        ids = [parts[0]]
        for (rows, columns), part in zip(grids, parts[1:], strict=True):
            ids += [np.array([START]), np.full(rows * columns // 4, IMAGE), np.array([END]), part]
        pixels = rng.normal(size=(sum(r * c for r, c in grids), 3 * 2 * 4 * 4)).astype(np.float32)
        grid = np.array([(1, r, c) for r, c in grids], np.int64).reshape(-1, 3)
        self.features.append(FakeFeatures(np.concatenate(ids).astype(np.int32), pixels, grid))
        return len(self.features) - 1


def verdict(reward: float, status: Any = "ok") -> Verdict:
    return Verdict(status, reward, reward, 1.0, {}, "")


def scored_group(
    group_id: int,
    prompt_ids: np.ndarray,
    responses: list[np.ndarray],
    rewards: list[float],
    *,
    row: int = 0,
    version: int = 0,
    source: str = "count",
    logprobs: list[np.ndarray] | None = None,
    statuses: list[str] | None = None,
) -> ScoredGroup:
    """A group whose completions were sampled by `version`; sampler log-probs default to −2."""
    logprobs = logprobs or [np.full(len(r), -2.0, np.float32) for r in responses]
    trajectories = [
        Trajectory(r.astype(np.int32), lp.astype(np.float32), [VersionSpan(version, len(r))], "stop", "")
        for r, lp in zip(responses, logprobs, strict=True)
    ]
    lease = Lease(
        group_id,
        0,
        SampleRef("world", row),
        SampleHeader(source, RewardSpec(), "", "", row),
        len(responses),
        Sampling(),
    )
    statuses = statuses or ["ok"] * len(responses)
    return ScoredGroup(
        Group(lease, prompt_ids, trajectories, 0),
        [verdict(x, s) for x, s in zip(rewards, statuses, strict=True)],
    )


def random_groups(
    world: World,
    rng: np.random.Generator,
    num_groups: int,
    size: int = 4,
    lengths: tuple[int, int] = (1, 9),
    images: str = "mixed",
) -> list[ScoredGroup]:
    """Groups over new prompts with 0, 1 or 2 images of different aspect (`images`: mixed or none)."""
    choices: list[list[tuple[int, int]]] = [[], [(4, 4)], [(4, 8), (6, 2)]] if images == "mixed" else [[]]
    groups = []
    for index in range(num_groups):
        row = world.add(rng, int(rng.integers(4, 20)), choices[index % len(choices)])
        responses = [rng.integers(6, VOCAB, int(rng.integers(*lengths, endpoint=True))) for _ in range(size)]
        rewards = [float(x) for x in rng.integers(0, 3, size)]
        if len(set(rewards)) == 1:
            rewards[0] += 1.0
        groups.append(
            scored_group(
                index, world.features[row].prompt_ids, responses, rewards, row=row, source=f"source_{index % 2}",
                logprobs=[rng.normal(-4, 0.3, len(r)) for r in responses],
            )
        )  # fmt: skip
    return groups


def config_with(**sections: dict[str, Any]) -> Config:
    """The default configuration with keys of some sections replaced."""
    tree = msgspec.to_builtins(Config())
    tree["model"]["dtype"] = "float32"
    for name, keys in sections.items():
        tree[name] = {**tree[name], **keys}
    return msgspec.convert(tree, Config)

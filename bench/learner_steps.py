"""Optimisation steps that `bench.learner` times: ours, and the padded batch that most trainers run. Same model, same tokens.

The padded batch is the strong form of the usual one: image features are computed once per prompt and log-probs in chunks, so
that what is compared is the packing alone. `naive=True` makes it the usual one: features per completion, full logits.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from learner.learner import Learner
from learner.model.build import build_policy, materialise
from verifiers import RewardSpec, Verdict
from vtriune.config import Config
from vtriune.config.tree import Model, Optimizer
from vtriune.messages import (
    Group,
    Lease,
    SampleHeader,
    SampleRef,
    Sampling,
    ScoredGroup,
    TrainOrder,
    Trajectory,
    VersionSpan,
)


@dataclass(frozen=True, eq=False)
class PromptData:
    """One prompt, as a Preprocessor gives it."""

    prompt_ids: np.ndarray
    pixel_values: np.ndarray
    image_grid_thw: np.ndarray


@dataclass(frozen=True, eq=False)
class Workload:
    """Prompts with equally many completions each; rewards are random and differ within a group."""

    prompts: list[PromptData]
    responses: list[list[np.ndarray]]

    @property
    def num_completions(self) -> int:
        return sum(len(of_group) for of_group in self.responses)

    @property
    def num_tokens(self) -> int:
        return sum(len(response) for of_group in self.responses for response in of_group)

    def groups(self) -> list[ScoredGroup]:
        """As the verifier pool delivers them."""
        rng = np.random.default_rng(0)
        result = []
        for index, (prompt, responses) in enumerate(zip(self.prompts, self.responses, strict=True)):
            trajectories = [
                Trajectory(
                    ids.astype(np.int32), np.full(len(ids), -1.0, np.float32), [VersionSpan(0, len(ids))], "stop", ""
                )
                for ids in responses
            ]
            lease = Lease(
                index,
                0,
                SampleRef("bench", index),
                SampleHeader("bench", RewardSpec(), "", "", index),
                len(responses),
                Sampling(),
            )
            rewards = rng.random(len(responses))
            verdicts = [Verdict("ok", float(reward), float(reward), 1.0, {}, "") for reward in rewards]
            result.append(ScoredGroup(Group(lease, prompt.prompt_ids.astype(np.int32), trajectories, 0), verdicts))
        return result


def workload(
    model: Any,
    *,
    num_groups: int,
    group_size: int,
    text: tuple[int, int],
    response: tuple[int, int],
    grid: tuple[int, int],
    seed: int = 0,
) -> Workload:
    """Random tokens: `text` and `response` are ranges of lengths, `grid` the patch rows and columns of each prompt's image."""
    rng = np.random.default_rng(seed)
    vocab = model.get_input_embeddings().weight.shape[0]
    vision = model.config.vision_config
    merged = grid[0] * grid[1] // vision.spatial_merge_size**2
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    special = {model.config.image_token_id, model.config.video_token_id, model.config.vision_start_token_id}
    ordinary = np.array([token for token in range(vocab) if token not in special])
    prompts, responses = [], []
    for _ in range(num_groups):
        ids = rng.choice(ordinary, int(rng.integers(*text, endpoint=True)))
        image = [
            model.config.vision_start_token_id,
            *[model.config.image_token_id] * merged,
            model.config.vision_end_token_id,
        ]
        prompts.append(
            PromptData(
                np.concatenate([image, ids]),
                rng.normal(size=(grid[0] * grid[1], width)).astype(np.float32),
                np.array([[1, *grid]], np.int64),
            )
        )
        responses.append([rng.choice(ordinary, int(rng.integers(*response, endpoint=True))) for _ in range(group_size)])
    return Workload(prompts, responses)


class Stopwatch:
    """`times` after the block: `seconds` on the wall and `cpu_s` of this process, all threads; the latter ignores other
    processes' load."""

    def __init__(self, device: torch.device):
        self._device = device
        self.times: dict[str, float] = {}

    def __enter__(self) -> "Stopwatch":
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times = {"seconds": time.perf_counter() - self._start[0], "cpu_s": time.process_time() - self._start[1]}


class OurStep:
    """The learner of the product: shared-prefix packs."""

    def __init__(self, folder: Path, device: torch.device, *, token_budget: int, dtype: str = "float32"):
        model = Model(path=str(folder), dtype=dtype)  # type: ignore[arg-type]
        self.policy = build_policy(model, device)
        materialise(self.policy, model, device)
        optimizer = Optimizer(token_budget=token_budget, lr=1e-6, warmup=0.0)
        config = msgspec.structs.replace(Config(), model=model, optimizer=optimizer)
        self._prompts: list[PromptData] = []
        self.learner = Learner(config, self.policy, lambda sample, _seed: self._prompts[sample.row])

    def __call__(self, work: Workload) -> dict[str, float]:
        """One whole step, image features included; the learner's metrics, `seconds`, `cpu_s`."""
        self._prompts = work.prompts
        groups = work.groups()
        self.learner.inbox.restore({"consumed": [], "open_from": 0})
        self.learner.prompts.forget_features()
        self.learner.prompts._prompts.clear()
        for group in groups:
            self.learner.deliver(group)
        ids = list(range(len(groups)))
        order = TrainOrder(0, [ids], "on_policy", 0, 0, "none", progress=[0.0, 1e-6])
        with Stopwatch(self.learner._layout.device) as watch:
            metrics = self.learner.train(order).metrics
        return {**metrics, **watch.times}


class PaddedStep:
    """Prompt + completion per row, right-padded, through transformers' own forward with scaled_dot_product_attention."""

    def __init__(self, folder: Path, device: torch.device, *, token_budget: int, naive: bool = False):
        from transformers import AutoModelForImageTextToText

        auto = AutoModelForImageTextToText
        self.model: Any = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device)
        self.model.model.visual.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._adamw = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.01, fused=True)
        self._trained, self._device, self._budget, self._naive = trained, device, token_budget, naive

    def __call__(self, work: Workload) -> dict[str, float]:
        """One whole step; `seconds`, `cpu_s`, `rows`."""
        with Stopwatch(self._device) as watch:
            num_rows = self._step(work)
        return {**watch.times, "rows": float(num_rows)}

    def _step(self, work: Workload) -> int:
        features = None if self._naive else self._features(work.prompts)
        rows = [(g, response) for g, of_group in enumerate(work.responses) for response in of_group]
        advantages = torch.randn(len(rows), generator=torch.Generator().manual_seed(0))
        longest = max(len(work.prompts[g].prompt_ids) + len(response) for g, response in rows)
        per_batch = max(1, self._budget // longest)
        num_rows = 0
        for first in range(0, len(rows), per_batch):
            batch = rows[first : first + per_batch]
            logprobs, owner = self._logprobs(work, batch, features)
            weight = advantages[first : first + per_batch].to(self._device)[owner]
            loss = -(torch.exp(logprobs - logprobs.detach()) * weight).sum() / work.num_tokens
            loss.backward()
            num_rows += len(batch) * longest
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._adamw.step()
        self._adamw.zero_grad()
        return num_rows

    @torch.no_grad()
    def _features(self, prompts: list[PromptData]) -> tuple[Tensor, ...]:
        pixels = torch.from_numpy(np.concatenate([p.pixel_values for p in prompts])).to(self._device)
        grids = torch.from_numpy(np.concatenate([p.image_grid_thw for p in prompts])).to(self._device)
        features: tuple[Tensor, ...] = self.model.get_image_features(pixels, grids).pooler_output
        return features

    def _logprobs(
        self, work: Workload, batch: list[tuple[int, np.ndarray]], features: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor]:
        """Response tokens' log-probs (R,) and the batch row of each."""
        length = max(len(work.prompts[g].prompt_ids) + len(response) for g, response in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        places, owners, targets = [], [], []
        for row, (g, response) in enumerate(batch):
            prompt = work.prompts[g].prompt_ids
            ids[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
            ids[row, len(prompt) : len(prompt) + len(response)] = torch.from_numpy(response.astype(np.int64))
            mask[row, : len(prompt) + len(response)] = 1
            places.append(torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1) + row * length)
            owners.append(torch.full((len(response),), row))
            targets.append(torch.from_numpy(response.astype(np.int64)))
        ids, mask = ids.to(self._device), mask.to(self._device)
        is_image = ids == self.model.config.image_token_id
        grids = torch.from_numpy(np.concatenate([work.prompts[g].image_grid_thw for g, _ in batch])).to(self._device)
        images: dict[str, Any] = {"image_grid_thw": grids}
        if features is None:
            images["pixel_values"] = torch.from_numpy(
                np.concatenate([work.prompts[g].pixel_values for g, _ in batch])
            ).to(self._device)
        else:
            embeds = self.model.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter(is_image[..., None], torch.cat([features[g] for g, _ in batch]))
            images["inputs_embeds"] = embeds
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=is_image.int(), image_grid_thw=grids, attention_mask=mask
        )
        place, target = torch.cat(places).to(self._device), torch.cat(targets).to(self._device)
        owner = torch.cat(owners).to(self._device)
        if features is None:
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **images
            ).logits
            logs = torch.log_softmax(logits.flatten(0, 1)[place], -1)
            return logs.gather(-1, target[:, None])[:, 0], owner
        hidden = self.model.model.language_model(
            inputs_embeds=images["inputs_embeds"], attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        from learner.model.logprobs import score_tokens

        return score_tokens(hidden.flatten(0, 1)[place], self.model.lm_head.weight, target).logprobs, owner

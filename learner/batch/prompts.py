"""What a group's prompt is made of: positions, and image features through the vision tower, computed once. Called by `learner.learner`.

Prompt and pixels come from the store, preprocessed by the one owner of preprocessing; the ids must equal those the engine
sampled after. Features of a frozen tower are kept per sample: in memory, bounded in bytes, least recently used dropped first; and
on disk with `model.feature_cache`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from learner.batch.feature_cache import FeatureCache
from learner.model.packing import PromptTokens
from learner.model.policy import Pixels, Policy
from learner.model.sharding import device_of
from vtriune.messages import Group, SampleRef
from vtriune.runtime import report_step


class PromptMismatch(ValueError):
    """The engine sampled after other ids than this learner would train on: positions and features would be wrong."""


class Features(Protocol):
    """The part of `vtriune.data.processing.Prompt` that is read here; pixels may be made by each read."""

    @property
    def prompt_ids(self) -> np.ndarray: ...
    @property
    def pixel_values(self) -> np.ndarray: ...
    @property
    def image_grid_thw(self) -> np.ndarray: ...


_PATCHES_PER_CALL = 16384
"""Of one call of the vision tower; a prompt with more is a call of its own."""
_MAX_PROMPTS = 4096
"""Prompts kept, a few KiB each; at least one update's share of a rank."""

Source = Callable[[SampleRef, int | None], Features]
"""(sample, prompt seed) → prompt ids int32 (P,), pixels float32 (patches, patch_dim), grids int64 (images, 3)."""


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Pixels of one prompt's images, as the vision tower takes them."""

    pixel_values: np.ndarray
    grid_thw: np.ndarray


class Prompts:
    """Looks prompts up for one rank. `is_tower_frozen` decides whether features are computed ahead and kept."""

    def __init__(
        self,
        policy: Policy,
        source: Source,
        *,
        is_tower_frozen: bool,
        open_disk: Callable[[], FeatureCache] | None = None,
    ):
        self._policy, self.source = policy, source
        self.is_tower_frozen = is_tower_frozen
        self._cache_bytes = 1 << 30
        self._prompts: OrderedDict[tuple[SampleRef, int | None], PromptTokens] = OrderedDict()
        self._features: OrderedDict[SampleRef, Tensor] = OrderedDict()
        self._num_bytes = 0
        self._open_disk = open_disk
        """Collective, and only once the tower has its weights; None: features are kept in memory only."""
        self._disk: FeatureCache | None = None
        self._device = device_of(policy.model)
        self.image_token_id: int | None = getattr(policy.model.config, "image_token_id", None)

    def prompt(self, group: Group) -> PromptTokens:
        """Ids and rotary positions; raises PromptMismatch when the group's ids are not those of the sample."""
        key = (group.lease.sample, group.lease.prompt_seed)
        if key not in self._prompts:
            self._load(group)
        self._prompts.move_to_end(key)
        found = self._prompts[key]
        if not np.array_equal(found.token_ids, group.prompt_ids):
            pairs = zip(found.token_ids, group.prompt_ids, strict=False)
            position = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise PromptMismatch(
                f"group {group.lease.group_id}, row {group.lease.sample.row}, prompt seed {group.lease.prompt_seed}: the engine's "
                f"prompt has {len(group.prompt_ids)} ids, ours {len(found.token_ids)}; they differ from position {position}. "
                "Generator and learner must use the same model folder and pixel bounds"
            )
        return found

    def prompt_of(self, features: Features) -> PromptTokens:
        """Ids with their rotary positions, by transformers' own rule where there are images."""
        ids, grid = features.prompt_ids.astype(np.int64), features.image_grid_thw
        if not len(grid):
            return PromptTokens(ids, np.broadcast_to(np.arange(len(ids)), (3, len(ids))).astype(np.int64))
        kinds = (ids == self.image_token_id).astype(np.int32)
        positions, _ = self._policy.model.model.get_rope_index(
            torch.from_numpy(ids)[None],
            mm_token_type_ids=torch.from_numpy(kinds)[None],
            image_grid_thw=torch.from_numpy(grid),
        )
        return PromptTokens(ids, positions[:, 0].numpy().astype(np.int64))

    def _load(self, group: Group) -> Features:
        """Preprocess the group's sample; its prompt is kept, so that pixels are not made twice for one group."""
        key = (group.lease.sample, group.lease.prompt_seed)
        features = self.source(*key)
        report_step("prompts", f"group {group.lease.group_id}, row {group.lease.sample.row}")
        self._prompts[key] = self.prompt_of(features)
        if len(self._prompts) > _MAX_PROMPTS:
            self._prompts.popitem(last=False)
        return features

    def images(self, group: Group) -> Images:
        """Pixels of the group's images."""
        features = self._load(group)
        return Images(features.pixel_values, features.image_grid_thw)

    def at_hand(self, groups: Sequence[Group]) -> dict[SampleRef, Tensor]:
        """Features of `groups`' samples that are in memory or on disk. Collective when the disk is first asked."""
        if self._open_disk is not None and self._disk is None:
            self._disk = self._open_disk()
        found: dict[SampleRef, Tensor] = {}
        for sample in {group.lease.sample: None for group in groups if self.has_images(group)}:
            features = self._features.get(sample)
            if features is not None:
                self._features.move_to_end(sample)
            elif self._disk is not None and (stored := self._disk.get(sample)) is not None:
                features = stored.to(self._device)
                self._remember(sample, features)
            if features is not None:
                found[sample] = features
        return found

    def has_images(self, group: Group) -> bool:
        return self.image_token_id is not None and bool((group.prompt_ids == self.image_token_id).any())

    def calls(self, groups: Sequence[Group], have: Mapping[SampleRef, Tensor]) -> list[dict[SampleRef, Images]]:
        """Pixels of the samples of `groups` whose features are not in `have`, in the vision-tower calls that will encode them."""
        calls: list[dict[SampleRef, Images]] = []
        room = 0
        absent = {group.lease.sample: group for group in groups if self.has_images(group)}
        for sample, group in absent.items():
            if sample in have:
                continue
            images = self.images(group)
            if len(images.pixel_values) > room:
                calls.append({})
                room = _PATCHES_PER_CALL
            calls[-1][sample] = images
            room -= len(images.pixel_values)
        return calls

    @torch.no_grad()
    def encode(self, call: Mapping[SampleRef, Images]) -> dict[SampleRef, Tensor]:
        """One call of the frozen tower. An empty `call` encodes one blank image: a rank must not skip a collective."""
        encoded = iter(self._policy.encode(*joined(list(call.values()) or [self.blank()], self._device)))
        return {sample: torch.cat(list(islice(encoded, len(images.grid_thw)))) for sample, images in call.items()}

    def keep(self, features: Mapping[SampleRef, Tensor]) -> None:
        """Cache what was computed: in memory, the least recently used dropped above the bound, and on disk where that is asked for."""
        for sample, tensor in features.items():
            self._remember(sample, tensor)
            if self._disk is not None:
                self._disk.put(sample, tensor)

    def _remember(self, sample: SampleRef, features: Tensor) -> None:
        report_step("image features", f"row {sample.row}")
        self._features[sample] = features
        self._num_bytes += features.nbytes
        while self._num_bytes > self._cache_bytes and self._features:
            _, dropped = self._features.popitem(last=False)
            self._num_bytes -= dropped.nbytes

    def forget_features(self) -> None:
        """Drop all features in memory; called when the tower's weights are loaded anew, whose features on disk are others."""
        self._features.clear()
        self._num_bytes = 0
        self._disk = None

    def blank(self) -> Images:
        """The smallest image the tower takes: one merged token."""
        vision = self._policy.model.config.vision_config
        side = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        return Images(np.zeros((side * side, width), np.float32), np.array([[1, side, side]], np.int64))


def joined(batch: Sequence[Images], device: torch.device) -> Pixels:
    """Pixels and grids of several prompts, one after another."""
    pixels = np.concatenate([images.pixel_values for images in batch])
    grids = np.concatenate([images.grid_thw for images in batch])
    return torch.from_numpy(pixels).to(device), torch.from_numpy(grids).to(device)

"""What a group's prompt is made of: positions, and image features through the vision tower, computed once. Called by `learner.learner`.

Prompt and pixels come from the store, preprocessed by the one owner of preprocessing; the ids must equal those the engine
sampled after. Features of a frozen tower are kept per sample: in memory, bounded in bytes, least recently used dropped first; and
on disk with `model.feature_cache`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from learner.feature_cache import FeatureCache
from learner.packing import Prompt
from learner.policy import Policy
from learner.publishing import device_of
from vtriune.messages import Group, SampleRef


class PromptMismatch(ValueError):
    """The engine sampled after other ids than this learner would train on: positions and features would be wrong."""


class Features(Protocol):
    """The part of `vtriune.data.processing.PromptFeatures` that is read here."""

    prompt_ids: np.ndarray
    pixel_values: np.ndarray
    image_grid_thw: np.ndarray


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
        cache_bytes: int = 1 << 30,
        patches_per_call: int = 16384,
        open_disk: Callable[[], FeatureCache] | None = None,
    ):
        self._policy, self.source = policy, source
        self.is_tower_frozen = is_tower_frozen
        self._cache_bytes, self._patches_per_call = cache_bytes, patches_per_call
        self._prompts: OrderedDict[tuple[SampleRef, int | None], Prompt] = OrderedDict()
        self._features: OrderedDict[SampleRef, Tensor] = OrderedDict()
        self._num_bytes = 0
        self._open_disk = open_disk
        """Collective, and only once the tower has its weights; None: features are kept in memory only."""
        self._disk: FeatureCache | None = None
        self._device = device_of(policy.model)
        settings: Any = policy.model.config
        self.image_token_id: int | None = getattr(settings, "image_token_id", None)
        self._settings = settings

    def prompt(self, group: Group) -> Prompt:
        """Ids and rotary positions; raises PromptMismatch when the group's ids are not those of the sample."""
        key = (group.lease.sample, group.lease.prompt_seed)
        found = self._prompts.get(key)
        if found is None:
            self._load(group)
            found = self._prompts[key]
        else:
            self._prompts.move_to_end(key)
        if not np.array_equal(found.token_ids, group.prompt_ids):
            shared = min(len(found.token_ids), len(group.prompt_ids))
            differing = np.flatnonzero(found.token_ids[:shared] != group.prompt_ids[:shared])
            position = int(differing[0]) if len(differing) else shared
            raise PromptMismatch(
                f"group {group.lease.group_id}, row {group.lease.sample.row}, prompt seed {group.lease.prompt_seed}: the engine's "
                f"prompt has {len(group.prompt_ids)} ids, ours {len(found.token_ids)}; they differ from position {position}. "
                "Generator and learner must use the same model folder and pixel bounds"
            )
        return found

    def positions(self, prompt_ids: np.ndarray, grid_thw: np.ndarray) -> np.ndarray:
        """Rotary positions int64 (3, P), by transformers' own rule where there are images."""
        if not len(grid_thw):
            return np.broadcast_to(np.arange(len(prompt_ids)), (3, len(prompt_ids))).astype(np.int64)
        ids = torch.from_numpy(prompt_ids.astype(np.int64))[None]
        kinds = (ids == self.image_token_id).int()
        positions, _ = self._policy.model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=torch.from_numpy(grid_thw)
        )
        array: np.ndarray = positions[:, 0].numpy().astype(np.int64)
        return array

    def images(self, group: Group) -> Images:
        """Pixels of the group's images, for a tower that is trained."""
        features = self._load(group)
        return Images(features.pixel_values, features.image_grid_thw)

    def _load(self, group: Group) -> Features:
        """Preprocess the group's sample; its prompt is kept, so that pixels are not made twice for one group."""
        key = (group.lease.sample, group.lease.prompt_seed)
        features = self.source(*key)
        positions = self.positions(features.prompt_ids, features.image_grid_thw)
        self._prompts[key] = Prompt(features.prompt_ids.astype(np.int64), positions)
        if len(self._prompts) > _MAX_PROMPTS:
            self._prompts.popitem(last=False)
        return features

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

    def missing(self, groups: Sequence[Group], have: Mapping[SampleRef, Tensor]) -> list[Group]:
        """Groups with images whose features are not in `have`, one per sample."""
        absent: dict[SampleRef, Group] = {}
        for group in groups:
            if group.lease.sample not in have and self.has_images(group):
                absent.setdefault(group.lease.sample, group)
        return list(absent.values())

    def has_images(self, group: Group) -> bool:
        return self.image_token_id is not None and bool((group.prompt_ids == self.image_token_id).any())

    def calls(self, groups: Sequence[Group]) -> list[list[tuple[SampleRef, Images]]]:
        """Pixels of `groups`, in the vision-tower calls that will encode them."""
        calls: list[list[tuple[SampleRef, Images]]] = []
        room = 0
        for group in groups:
            images = self.images(group)
            if len(images.pixel_values) > room:
                calls.append([])
                room = self._patches_per_call
            calls[-1].append((group.lease.sample, images))
            room -= len(images.pixel_values)
        return calls

    @torch.no_grad()
    def encode(self, call: Sequence[tuple[SampleRef, Images]], device: torch.device) -> dict[SampleRef, Tensor]:
        """One call of the frozen tower. An empty `call` encodes one blank image: a rank must not skip a collective."""
        batch = [images for _, images in call] or [self.blank()]
        encoded = self._policy.encode(*joined(batch, device))
        result: dict[SampleRef, Tensor] = {}
        start = 0
        for sample, images in call:
            stop = start + len(images.grid_thw)
            result[sample] = torch.cat(encoded[start:stop])
            start = stop
        return result

    def keep(self, features: Mapping[SampleRef, Tensor]) -> None:
        """Cache what was computed: in memory, the least recently used dropped above the bound, and on disk where that is asked for."""
        for sample, tensor in features.items():
            self._remember(sample, tensor)
            if self._disk is not None:
                self._disk.put(sample, tensor)

    def _remember(self, sample: SampleRef, features: Tensor) -> None:
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
        vision: Any = self._settings.vision_config
        side = vision.spatial_merge_size
        channels = getattr(vision, "in_channels", None) or vision.in_chans
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        return Images(np.zeros((side * side, width), np.float32), np.array([[1, side, side]], np.int64))


def joined(batch: Sequence[Images], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels and grids of several prompts, one after another."""
    pixels = np.concatenate([images.pixel_values for images in batch])
    grids = np.concatenate([images.grid_thw for images in batch])
    return torch.from_numpy(pixels).to(device), torch.from_numpy(grids).to(device)

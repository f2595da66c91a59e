"""How published tensors lie in the buckets that travel, and the checksum both sides compare.

Called by learner/publishing.py (which packs) and actors/engine (which unpacks): both derive the same layout from the same
manifest, so that nothing but bytes crosses the group.
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from vtriune.messages import WeightEntry

BUCKET_BYTES = 64 * 2**20
"""Payload of one bucket unless a single tensor is larger: what bounds either side's extra memory."""

_ALIGNMENT = 16
_DIGEST_CHUNK = 2**18
"""Words of eight bytes digested at once."""
_ODD = 0x9E3779B97F4A7C15 - 2**64
_MASK = 2**64 - 1


class Slot(NamedTuple):
    """Where a tensor lies in its bucket, in bytes."""

    entry: WeightEntry
    offset: int
    num_bytes: int


class Bucket(NamedTuple):
    """Tensors that travel together, in the manifest's order."""

    slots: list[Slot]
    num_bytes: int


def dtype_of(entry: WeightEntry) -> torch.dtype:
    """The torch dtype that `entry` names; ValueError for one that is never published."""
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype.is_complex:
        raise ValueError(f"{entry.name}: dtype {entry.dtype!r} cannot be published")
    return dtype


def entry_of(name: str, shape: Iterable[int], dtype: torch.dtype) -> WeightEntry:
    """The manifest's entry of a tensor of this name, (global) shape and dtype."""
    return WeightEntry(name, [int(size) for size in shape], str(dtype).removeprefix("torch."))


def num_bytes_of(entry: WeightEntry) -> int:
    """Bytes of the tensor without padding."""
    return math.prod(entry.shape) * dtype_of(entry).itemsize


def buckets_of(entries: Sequence[WeightEntry], bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """Cut `entries` into buckets of at most `bucket_bytes`, a larger tensor alone in its own."""
    slots: list[Slot] = []
    end = 0
    for entry in entries:
        size = num_bytes_of(entry)
        if slots and end + size > bucket_bytes:
            yield Bucket(slots, end)
            slots, end = [], 0
        slots.append(Slot(entry, end, size))
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    if slots:
        yield Bucket(slots, end)


def view_of(buffer: torch.Tensor, slot: Slot) -> torch.Tensor:
    """The tensor of `slot` inside `buffer`, uint8 (num_bytes,), without a copy."""
    flat = buffer[slot.offset : slot.offset + slot.num_bytes]
    return flat.view(dtype_of(slot.entry)).view(slot.entry.shape)


class Checksum:
    """Hash over names, shapes, dtypes and bytes of tensors in order; the same on every device.

    Bytes are taken as 64-bit words x₀, x₁, … (zero-padded) and digested to Σ (2i+1)·c·xᵢ mod 2⁶⁴ per chunk, chunks chained by
    a multiplication: one pass at memory speed on CPU and GPU, and every swap, shift or change of a word changes it. It guards
    against faults, not against an adversary.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_tensors = 0
        self.num_bytes = 0

    def add(self, entry: WeightEntry, tensor: torch.Tensor) -> None:
        """Digest the next tensor; contiguous, of the entry's shape and dtype."""
        identity = f"{entry.name}|{entry.shape}|{entry.dtype}|{_digest(tensor):016x};"
        self._hash.update(identity.encode())
        self.num_tensors += 1
        self.num_bytes += tensor.numel() * tensor.element_size()

    def hexdigest(self) -> str:
        """32 hex digits over everything added so far."""
        return self._hash.hexdigest()


def _digest(tensor: torch.Tensor) -> int:
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    words = flat[:whole]
    # A view of another word size needs an aligned start; bucket slots have it, a tensor cut out of another one may not.
    words = (words if words.storage_offset() % 8 == 0 else words.clone()).view(torch.int64)
    weights = _weights(words.device)
    total = flat.numel()
    for start in range(0, words.numel(), _DIGEST_CHUNK):
        chunk = words[start : start + _DIGEST_CHUNK]
        total = (total * 0x100000001B3 + int((chunk * weights[: chunk.numel()]).sum())) & _MASK
    tail = int.from_bytes(bytes(flat[whole:].tolist()), "little")
    return (total * 0x100000001B3 + tail) & _MASK


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """int64 (_DIGEST_CHUNK,), odd multipliers; int64 arithmetic wraps on every device."""
    return (torch.arange(_DIGEST_CHUNK, dtype=torch.int64, device=device) * 2 + 1) * _ODD

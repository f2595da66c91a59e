"""Buckets and checksums of published tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtriune.messages import WeightEntry
from vtriune.weights.layout import Checksum, buckets_of, dtype_of, entry_of, num_bytes_of, view_of

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
tensors = st.lists(st.tuples(st.lists(st.integers(0, 7), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=12)


def _made(shapes: list[tuple[list[int], torch.dtype]]) -> list[tuple[WeightEntry, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, (shape, dtype) in enumerate(shapes):
        tensor = (torch.rand(shape, generator=generator) * 100).to(dtype)
        made.append((entry_of(f"t{index}", tensor.shape, dtype), tensor))
    return made


def _checksum(pairs: list[tuple[WeightEntry, torch.Tensor]]) -> str:
    checksum = Checksum()
    for entry, tensor in pairs:
        checksum.add(entry, tensor)
    return checksum.hexdigest()


@settings(deadline=None)
@given(tensors, st.integers(1, 300))
def test_what_is_packed_into_buckets_comes_out_of_them(shapes: list[tuple[list[int], torch.dtype]], limit: int) -> None:
    made = _made(shapes)
    buckets = list(buckets_of([entry for entry, _ in made], limit))
    assert [slot.entry for bucket in buckets for slot in bucket.slots] == [entry for entry, _ in made]
    by_name = {entry.name: tensor for entry, tensor in made}
    for bucket in buckets:
        payload = sum(slot.num_bytes for slot in bucket.slots)
        assert payload <= limit or len(bucket.slots) == 1
        buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        for slot in bucket.slots:
            view_of(buffer, slot).copy_(by_name[slot.entry.name])
        for slot in bucket.slots:
            assert torch.equal(view_of(buffer, slot), by_name[slot.entry.name])


@settings(deadline=None)
@given(tensors)
def test_the_checksum_does_not_depend_on_where_the_bytes_lie(shapes: list[tuple[list[int], torch.dtype]]) -> None:
    made = _made(shapes)
    shifted = []
    for entry, tensor in made:
        room = torch.zeros(num_bytes_of(entry) + 16, dtype=torch.uint8)
        moved = room[dtype_of(entry).itemsize :][: num_bytes_of(entry)].view(dtype_of(entry)).view(entry.shape)
        shifted.append((entry, moved.copy_(tensor)))
    assert _checksum(made) == _checksum(shifted)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, 2**18 * 8 + 5, 2**19 * 8])
def test_one_flipped_bit_anywhere_changes_the_checksum(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    entry = entry_of("t", tensor.shape, tensor.dtype)
    seen = {_checksum([(entry, tensor)])}
    for place in {0, size // 2, size - 1}:
        flipped = tensor.clone()
        flipped[place] ^= 1
        seen.add(_checksum([(entry, flipped)]))
    assert len(seen) == 1 + len({0, size // 2, size - 1})


def test_swapped_words_swapped_tensors_and_other_names_change_the_checksum() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 4.0, 1.0, 2.0])
    first, second = entry_of("a", a.shape, a.dtype), entry_of("b", b.shape, b.dtype)
    sums = {
        _checksum(pairs)
        for pairs in ([(first, a)], [(first, b)], [(second, a)], [(first, a), (second, b)], [(second, b), (first, a)])
    }
    assert len(sums) == 5


def test_a_dtype_that_is_never_published_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="t: dtype 'complex64' cannot be published"):
        dtype_of(WeightEntry("t", [1], "complex64"))

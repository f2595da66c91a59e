"""Payloads come back as they went, and whatever else arrives is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vtriune.transport import codec, wire
from vtriune.transport.codec import INLINE_BYTES, Schema, pack
from vtriune.transport.wire import WireError


class Inner(msgspec.Struct):
    array: npt.NDArray[np.float32]
    note: str | None = None


class Outer(msgspec.Struct):
    items: list[Inner]
    by_name: dict[str, np.ndarray]
    pair: tuple[int, float]


def back(schema: Schema, *values: object) -> tuple[object, ...]:
    payload = pack(values)
    return schema.unpack(payload.body, payload.frames, payload.blobs)


dtypes = st.one_of(
    hnp.integer_dtypes(),
    hnp.floating_dtypes(),
    hnp.boolean_dtypes(),
    hnp.complex_number_dtypes(),
    hnp.unicode_string_dtypes(),
)


@settings(max_examples=200, deadline=None)
@given(array=hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, min_side=0, max_side=6)))
def test_any_array_arrives_equal_in_dtype_shape_and_bytes(array: np.ndarray) -> None:
    (received,) = back(Schema(("a",), (np.ndarray,)), array)
    assert isinstance(received, np.ndarray)
    assert (received.dtype, received.shape, received.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_travel_beside_the_body_and_keep_their_layout_of_values(order: str) -> None:
    array = np.asarray(np.arange(INLINE_BYTES, dtype=np.int32).reshape(64, -1), order=order)  # type: ignore[call-overload]
    payload = pack((array, array[:, ::2]))
    assert len(payload.body) < 100
    assert [memoryview(frame).nbytes for frame in payload.frames] == [array.nbytes, array.nbytes // 2]
    first, second = Schema(("a", "b"), (np.ndarray, np.ndarray)).unpack(payload.body, payload.frames, ())
    np.testing.assert_array_equal(first, array)
    np.testing.assert_array_equal(second, array[:, ::2])


def test_arrays_are_sent_without_a_copy() -> None:
    array = np.zeros(INLINE_BYTES, np.uint8)
    payload = pack((array,))
    array[0] = 7
    assert memoryview(payload.frames[0])[0] == 7


def test_received_arrays_are_read_only_views_of_their_frames() -> None:
    payload = pack((np.arange(INLINE_BYTES, dtype=np.int32),))
    frame = bytes(payload.frames[0])
    (received,) = Schema(("a",), (np.ndarray,)).unpack(payload.body, [frame], ())
    assert np.shares_memory(received, np.frombuffer(frame, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        received[0] = 7


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(0, 3 * INLINE_BYTES),
    kind=st.sampled_from([bytes, bytearray, memoryview]),
    before=st.integers(),
    after=st.text(),
)
def test_byte_strings_of_any_size_and_kind_arrive(size: int, kind: type, before: int, after: str) -> None:
    before %= 2**63
    data = bytes(range(256)) * (size // 256 + 1)
    sent = kind(data[:size])
    received = back(Schema(("x", "data", "y"), (int, kind, str)), before, sent, after)
    assert isinstance(received[1], kind)
    assert (received[0], bytes(received[1]), received[2]) == (before, data[:size], after)


def test_structs_with_arrays_inside_lists_and_dicts_arrive() -> None:
    large = np.random.default_rng(0).random(INLINE_BYTES, dtype=np.float32)
    outer = Outer([Inner(large), Inner(large[:3], "small")], {"ids": np.arange(5)}, (1, 2.5))
    (received,) = back(Schema(("outer",), (Outer,)), outer)
    assert isinstance(received, Outer)
    np.testing.assert_array_equal(received.items[0].array, large)
    np.testing.assert_array_equal(received.items[1].array, large[:3])
    np.testing.assert_array_equal(received.by_name["ids"], np.arange(5))
    assert (received.items[1].note, received.pair) == ("small", (1, 2.5))


def test_a_misfit_is_named_by_argument_and_field() -> None:
    schema = Schema(("count", "outer"), (int, Outer))
    good = Outer([Inner(np.zeros(2, np.float32))], {}, (1, 1.0))
    with pytest.raises(TypeError, match="count: Expected `int`, got `str`"):
        schema.check(("1", good))
    bad = Outer([Inner(np.zeros(2, np.float32), 5)], {}, (1, 1.0))  # type: ignore[arg-type]
    payload = pack((1, bad))
    with pytest.raises(WireError, match=r"outer\.items\[0\]\.note: Expected `str \| null`, got `int`"):
        schema.unpack(payload.body, payload.frames, payload.blobs)
    with pytest.raises(TypeError, match="cannot be sent"):
        pack((object(),))
    with pytest.raises(TypeError, match="dtype object cannot be sent"):
        pack((np.array([object()]),))


ARRAY_WIRES = st.tuples(
    st.one_of(
        st.sampled_from(["<f4", "<i4", "|u1", "|O", "<U3", "|V8", "<M8[s]", "<08", "f4,(2**9)i4"]), st.text(max_size=8)
    ),
    st.lists(st.integers(-3, 2**64 - 1), max_size=5),
    st.one_of(st.integers(-2, 3), st.binary(max_size=64)),
)


@settings(max_examples=300, deadline=None)
@given(described=ARRAY_WIRES, frame=st.binary(max_size=64))
def test_a_forged_array_is_refused_or_fits_its_bytes(described: object, frame: bytes) -> None:
    body = msgspec.msgpack.encode([described])
    try:
        (array,) = Schema(("a",), (np.ndarray,)).unpack(body, [frame], ())
    except WireError:
        return
    assert array.nbytes <= 64


@pytest.mark.parametrize("name", ["<08", "f4,i4", "(2,)f4", "<f4\n", "float32", "<O8", "", "<M8[" + "9" * 40 + "s]"])
def test_a_dtype_in_another_language_than_ours_is_refused(name: str) -> None:
    with pytest.raises(WireError, match="unknown array dtype"):
        Schema(("a",), (np.ndarray,)).unpack(msgspec.msgpack.encode([[name, [1], b"1234"]]), (), ())


@settings(max_examples=300, deadline=None)
@given(header=st.binary(max_size=200))
def test_arbitrary_bytes_are_a_message_or_a_wire_error(header: bytes) -> None:
    try:
        message = wire.decode(header)
    except WireError:
        return
    assert isinstance(message, wire.Message)  # type: ignore[arg-type]


def test_nesting_is_bounded() -> None:
    for depth in (wire.MAX_NESTING + 1, 5000):
        with pytest.raises(WireError, match="nested"):
            codec.UNTYPED_RESULT.unpack(b"\x91" * (depth + 1) + b"\xc0", (), ())
    assert codec.UNTYPED_RESULT.unpack(b"\x91" * (wire.MAX_NESTING + 1) + b"\xc0", (), ())


def test_schemas_of_the_same_classes_may_be_built_and_used_by_many_threads_at_once() -> None:
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-m", "tests.transport.schema_hammer"], cwd=root, capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout) == (0, "80 trees read\n"), process.stderr

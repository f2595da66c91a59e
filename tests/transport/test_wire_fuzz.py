"""The fuzz target's promise, checked by hypothesis on every run."""

from __future__ import annotations

import typing

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport import fuzz_wire
from vtriune.transport import codec, wire


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    fuzz_wire.one_input(data)


VALID = codec.pack((1, [fuzz_wire.Leaf(np.arange(20), b"abc", "x")], bytes(10))).body


@settings(max_examples=500, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4),
    first=st.binary(min_size=2, max_size=2),
)
def test_mutated_payloads_raise_nothing_but_wire_errors(changes: list[tuple[int, int]], first: bytes) -> None:
    mutated = bytearray(VALID)
    for position, value in changes:
        mutated[position] = value
    fuzz_wire.one_input(first + bytes(mutated))


@settings(max_examples=60, deadline=None)
@given(
    value=st.recursive(
        st.none() | st.integers() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_well_formed_messages_of_the_wrong_shape_raise_nothing_but_wire_errors(value: object) -> None:
    try:
        body = msgspec.msgpack.encode([value, value, value])
    except OverflowError:
        return
    fuzz_wire.one_input(b"\xff\x00" + body)


def test_the_seeds_are_messages_and_payloads_that_decode() -> None:
    *messages, payload = fuzz_wire.seeds()
    assert {type(wire.decode(message)) for message in messages} == set(typing.get_args(wire.Message))
    one, leaves, data = fuzz_wire.SCHEMAS[0].unpack(payload[2:], [bytes(codec.INLINE_BYTES), bytes(32_000)], (2,))
    assert (one, len(leaves), len(data)) == (1, 2, codec.INLINE_BYTES)
    for seed in (*messages, payload):
        fuzz_wire.one_input(seed)

"""Typed payloads: values to one msgpack body plus frames, and back, by annotation. Used by the runtime's endpoints.

Byte strings given as arguments or returned, and NumPy arrays wherever they stand, travel as frames of their own once
they reach `INLINE_BYTES`; smaller ones are cheaper inside the body. Sending copies neither: the caller must leave an
array or buffer unchanged until its call has been answered. Received arrays are views of the received frame and
therefore read-only; `array.copy()` where one must be written.

No class is ever named by the sender: the receiver's annotations decide what is built.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args, get_origin

import msgspec

from vtriune.transport.wire import MAX_NESTING, Buffer, Payload, WireError

INLINE_BYTES = 8192
_MAX_DIMENSIONS = 32
_MAX_SIZE = 1 << 48
# What `dtype.str` gives for the kinds that travel. Nothing else reaches NumPy, which parses a language of its own.
_DTYPE_NAME = re.compile(r"[<>|][biufcSUMm][0-9]{1,9}(\[[0-9]{0,9}[A-Za-z]{1,2}\])?")
# Annotations that are no classes, as the class of their values.
_PLAIN: dict[Any, Any] = {None: type(None)}
# Values of these classes never bring frames.
_FRAMELESS = frozenset((int, float, bool, str, type(None)))
_BLOB_TYPES = (bytes, bytearray, memoryview)
# msgspec describes a struct on first use, and other threads see the description before it is complete: a decoder they
# build then crashes on its first message. So decoders are built by one thread at a time; those that exist may be used
# by any. Reentrant, because resolving annotations may import modules that build decoders of their own.
_building = threading.RLock()


class WireType(NamedTuple):
    """How a class that msgspec does not know travels: as `struct`, made and read by two functions."""

    struct: Any
    to_wire: Callable[[Any], Any]
    from_wire: Callable[[Any, Any], Any]


class _Frames(threading.local):
    """Frames of the payload being encoded or decoded by this thread."""

    outgoing: list[Buffer]
    incoming: Sequence[Any]


_frames = _Frames()
_wire_types: dict[type, WireType] = {}


def register(cls: type, wire_type: WireType) -> None:
    """Let instances of `cls` (and its subclasses) travel in payloads."""
    with _building:
        msgspec.msgpack.Decoder(wire_type.struct)
    _wire_types[cls] = wire_type


def _wire_type_of(cls: type) -> WireType | None:
    return next((_wire_types[base] for base in cls.__mro__ if base in _wire_types), None)


def _array_class() -> type | None:
    """numpy.ndarray where this process uses NumPy at all; importing it here would triple the import time."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.ndarray


def _encode_hook(value: Any) -> Any:
    array_class = _array_class()
    if array_class is not None and isinstance(value, array_class):
        return _array_to_wire(value)
    wire_type = _wire_type_of(type(value))
    if wire_type is not None:
        return wire_type.to_wire(value)
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} cannot be sent; use a msgspec.Struct")


def _array_to_wire(array: Any) -> tuple[str, tuple[int, ...], bytes | int]:
    if array.dtype.kind not in "biufcSUMm":
        raise TypeError(f"an array of dtype {array.dtype} cannot be sent")
    if array.nbytes < INLINE_BYTES:
        return array.dtype.str, array.shape, array.tobytes()
    flat = array if array.flags.c_contiguous else array.copy(order="C")
    _frames.outgoing.append(memoryview(flat.reshape(-1).view("u1")))
    return array.dtype.str, array.shape, len(_frames.outgoing) - 1


_ArrayWire = tuple[str, tuple[int, ...], bytes | int]


@functools.lru_cache(maxsize=64)
def _dtype(name: str) -> Any:
    """None for what is no plain dtype. Remembered: a group has two arrays a completion."""
    import numpy as np

    try:
        return np.dtype(name) if _DTYPE_NAME.fullmatch(name) else None
    except TypeError:
        return None


def _array_from_wire(wire: Any, annotation: Any) -> Any:
    import numpy as np

    if isinstance(wire, np.ndarray):
        array = wire
    else:
        dtype_name, shape, source = msgspec.convert(wire, _ArrayWire)
        dtype = _dtype(dtype_name)
        if dtype is None:
            raise ValueError(f"unknown array dtype {dtype_name[:32]!r}")
        if len(shape) > _MAX_DIMENSIONS or any(not 0 <= size <= _MAX_SIZE for size in shape):
            raise ValueError(f"no array of dtype {dtype_name[:32]!r} and shape {shape[:8]} is accepted")
        if isinstance(source, int) and not 0 <= source < len(_frames.incoming):
            raise ValueError(f"array names frame {source}, the message has {len(_frames.incoming)}")
        buffer = memoryview(_frames.incoming[source] if isinstance(source, int) else source)
        num_items = math.prod(shape)
        if num_items * dtype.itemsize != buffer.nbytes:
            raise ValueError(f"array of shape {shape} and dtype {dtype_name} does not fit {buffer.nbytes} bytes")
        array = np.frombuffer(buffer, dtype).reshape(shape) if num_items else np.empty(shape, dtype)
    for argument in get_args(annotation)[1:]:
        for scalar in get_args(argument):
            if isinstance(scalar, type) and not issubclass(array.dtype.type, scalar):
                raise ValueError(f"expected an array of {scalar.__name__}, got {array.dtype}")
    return array


def _decode_hook(annotation: Any, wire: Any) -> Any:
    cls = get_origin(annotation) or annotation
    array_class = _array_class()
    if array_class is not None and isinstance(cls, type) and issubclass(cls, array_class):
        return _array_from_wire(wire, annotation)
    wire_type = _wire_type_of(cls) if isinstance(cls, type) else None
    if wire_type is None:
        raise TypeError(f"{annotation!r} cannot travel in a message; use a msgspec.Struct")
    if isinstance(wire, cls):
        return wire
    return wire_type.from_wire(msgspec.convert(wire, wire_type.struct), annotation)


_encode = msgspec.msgpack.Encoder(enc_hook=_encode_hook).encode


def pack(values: Sequence[Any]) -> Payload:
    """Encode an argument list or, as a list of one, a result.

    Raises TypeError: a value of a type that cannot travel.
    """
    frames: list[Buffer] = []
    blobs: list[int] = []
    num_bytes = 0
    for position, value in enumerate(values):
        if type(value) in _BLOB_TYPES:
            size = value.nbytes if type(value) is memoryview else len(value)
            if size >= INLINE_BYTES:
                if not blobs:
                    values = list(values)
                values[position] = b""  # type: ignore[index]
                blobs.append(position)
                frames.append(value)
    _frames.outgoing = frames
    try:
        body = _encode(values)
    finally:
        _frames.outgoing = []
    if frames:
        num_bytes = sum(memoryview(frame).nbytes for frame in frames)
    return Payload(body, frames, tuple(blobs), num_bytes + len(body))


class Schema:
    """The types of an argument list, or of a result as a list of one: checks what is sent, reads what arrived.

    Args:
        names: What to call each item in an error.
        types: The annotation of each item.
    """

    def __init__(self, names: Sequence[str], types: Sequence[Any]) -> None:
        self.names = tuple(names)
        self.type: Any = tuple[tuple(types)] if types else tuple[()]  # type: ignore[misc]
        with _building:
            self._decode = msgspec.msgpack.Decoder(self.type, dec_hook=_decode_hook).decode
        self._is_open = _is_open(self.type)
        self._plain = tuple(_PLAIN.get(each, each) for each in types)
        self._is_frameless = _FRAMELESS.issuperset(self._plain)

    def pack(self, values: Sequence[Any]) -> Payload:
        """Check and encode. Raises TypeError: an item does not fit; the text names it."""
        if tuple(map(type, values)) != self._plain:
            self.check(values)
        elif self._is_frameless:
            body = _encode(values)
            return Payload(body, (), (), len(body))
        return pack(values)

    def check(self, values: Sequence[Any]) -> None:
        """Raise TypeError naming the item that does not fit. Structs are checked by class, not field by field: the
        receiver checks those as it reads them."""
        try:
            msgspec.convert(values, self.type, dec_hook=_decode_hook)
        except (msgspec.ValidationError, ValueError) as error:
            raise TypeError(self._named(str(error))) from None

    def unpack(self, body: bytes | msgspec.Raw, frames: Sequence[Any], blobs: Sequence[int]) -> tuple[Any, ...]:
        """Read a payload. Raises WireError: it does not fit; the text names the item and field."""
        num_blobs = len(blobs)
        if num_blobs > len(frames):
            raise WireError(f"{num_blobs} byte strings announced, {len(frames)} frames came")
        _frames.incoming = frames
        try:
            values: tuple[Any, ...] = self._decode(body)
        except (msgspec.DecodeError, ValueError, TypeError) as error:
            raise WireError(self._named(str(error))) from None
        except RecursionError:
            raise WireError("lists or dicts nested too deeply") from None
        finally:
            _frames.incoming = ()
        if self._is_open and _depth(values) > MAX_NESTING + 1:
            raise WireError(f"lists or dicts nested deeper than {MAX_NESTING}")
        return self._with_blobs(values, frames, blobs) if blobs else values

    def _with_blobs(self, values: tuple[Any, ...], frames: Sequence[Any], blobs: Sequence[int]) -> tuple[Any, ...]:
        items = list(values)
        for position, frame in zip(blobs, frames, strict=False):
            if not 0 <= position < len(items) or type(items[position]) not in _BLOB_TYPES:
                raise WireError(f"item {position} was sent as a byte string, which its annotation does not allow")
            kind = type(items[position])
            items[position] = memoryview(frame) if kind is memoryview else kind(memoryview(frame))
        return tuple(items)

    def _named(self, text: str) -> str:
        """msgspec's path `$[1].rewards[0]` as `name.rewards[0]`."""
        before, mark, path = text.rpartition(" - at `$[")
        index, bracket, rest = path.partition("]")
        if not mark or not bracket or not index.isdigit() or int(index) >= len(self.names):
            return text
        return f"{self.names[int(index)]}{rest.rstrip('`')}: {before}"


def _is_open(annotation: Any) -> bool:
    """Whether the annotation leaves the nesting of what it admits to the sender."""
    return annotation in (Any, object) or any(_is_open(argument) for argument in get_args(annotation))


def _depth(value: Any) -> int:
    """Levels of lists, tuples and dicts."""
    deepest, pending = 0, [(value, 1)]
    while pending:
        item, level = pending.pop()
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
        if children:
            deepest = max(deepest, level)
            pending += [(child, level + 1) for child in children]
    return deepest


UNTYPED_RESULT = Schema(("result",), (Any,))

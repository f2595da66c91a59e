"""Atheris target for the decoders: whatever the bytes, decoding ends in a message, a payload or a WireError.

Atheris needs no more than msgspec, pyzmq and NumPy beside it, so it may live in an environment of its own:

    python3.11 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris msgspec numpy pyzmq
    mkdir -p /tmp/fuzz/corpus && /tmp/fuzz/bin/python -m tests.transport.fuzz_wire --seeds /tmp/fuzz/corpus
    /tmp/fuzz/bin/python -m tests.transport.fuzz_wire -runs=1000000 -max_len=512 /tmp/fuzz/corpus

from the repository's root. `--seeds` writes one valid message of every kind to start from; what finds new paths is kept
there too. hypothesis checks the same promise on every run of the tests, in tests/transport/test_wire_fuzz.py.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import FunctionType

import msgspec
import numpy as np

from vtriune.transport import codec, wire
from vtriune.transport.wire import Call, PeerRef


class Leaf(msgspec.Struct):
    array: np.ndarray
    data: bytes
    note: str | None = None


SCHEMAS = (
    codec.Schema(("x", "leaves", "data"), (int, list[Leaf], bytes)),
    codec.Schema(("any",), (dict[str, list[np.ndarray]],)),
    codec.UNTYPED_RESULT,
)


def one_input(data: bytes) -> None:
    """Read `data` as a header and, if it is a call, its arguments; then its pieces as a payload with frames."""
    with contextlib.suppress(wire.WireError):
        message = wire.decode(data)
        if isinstance(message, Call):
            _unpack(bytes(message.args), [data], message.blobs)
    if len(data) >= 2:
        split = data[0] % len(data)
        _unpack(data[1:split], [data[split:]], (data[1] % 4,) if data[1] % 2 else ())


def _unpack(body: bytes, frames: list[bytes], blobs: tuple[int, ...]) -> None:
    for schema in SCHEMAS:
        with contextlib.suppress(wire.WireError):
            schema.unpack(body, frames, blobs)


def seeds() -> list[bytes]:
    """A valid message of every kind, and a payload."""
    me = PeerRef("n", "ipc://n", "m", 0, "h", 1)
    failure = wire.FailureNote("m", 0, "h", 1, "exit", 3)
    leaves = [Leaf(np.arange(4000), b"abc", "x"), Leaf(np.zeros((2, 3), np.float32), b"")]
    payload = codec.pack((1, leaves, bytes(codec.INLINE_BYTES)))
    call = Call(1, "echo#n.1", "ping", msgspec.Raw(payload.body), 3, (), payload.blobs, False, 1.5)
    messages: list[wire.Message] = [
        wire.Hello(wire.PROTOCOL, me, 7),
        wire.Welcome(wire.PROTOCOL, 1, 0, 5, 16, 1 << 20),
        wire.Refused("no"),
        call,
        wire.Reply(1, msgspec.Raw(b"\x91\x01")),
        wire.Fault(1, wire.ErrorNote("raised", "builtins.ValueError", "t", "tb")),
        wire.Done((1, 2)),
        wire.Cancel(3),
        wire.Gone("n", failure),
        wire.Back(me),
    ]
    return [*(wire.encode(message) for message in messages), b"\xff\x00" + payload.body]


def main() -> None:
    """Write the seeds, or run libFuzzer."""
    if sys.argv[1:2] == ["--seeds"]:
        for index, seed in enumerate(seeds()):
            (Path(sys.argv[2]) / f"seed-{index}").write_bytes(seed)
        return
    import atheris

    for owner in (codec, wire, codec.Schema, wire.Limits):
        for function in vars(owner).values():
            if isinstance(function, FunctionType):
                atheris.instrument_func(function)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Atheris target for the decoders: `pip install atheris; python -m tests.fuzz.fuzz_wire [libFuzzer options]`.

Whatever the bytes, decoding ends in a message, a payload or a WireError.
"""

from __future__ import annotations

import contextlib
import sys

import msgspec
import numpy as np

from vtriune.transport import codec, wire


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
    """Read `data` as a header, and its pieces as a payload with frames."""
    with contextlib.suppress(wire.WireError):
        wire.decode(data)
    if len(data) < 2:
        return
    split = data[0] % len(data)
    for schema in SCHEMAS:
        try:
            schema.unpack(data[1:split], [data[split:]], (data[1] % 4,) if data[1] % 2 else ())
        except wire.WireError:
            continue


def main() -> None:
    """Run libFuzzer."""
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

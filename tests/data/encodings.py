"""Pictures as files, for the tests: what Pillow does not write (16 bits a channel, colour profiles) is written by the book."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

WIDE_GAMUT = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
"""Adobe RGB (1998): linear RGB → XYZ under D50, as its ICC profile says it."""
SRGB_D50 = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def saved(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The picture as a file of `kind`."""
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, kind, **options)
    return out.getvalue()


def png(pixels: np.ndarray, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """(H, W) or (H, W, 2 to 4) whole numbers as PNG with `bits` a channel; `chunks` stand before the pixels."""
    height, width = pixels.shape[:2]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    if bits < 8:
        planes = np.unpackbits(pixels.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        rows = np.packbits(planes.reshape(height, -1), axis=-1)
    else:
        rows = pixels.astype(f">u{bits // 8}").reshape(height, -1).view(np.uint8)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def icc(gamma: float, primaries: np.ndarray | None) -> bytes:
    """An ICC profile of version 2: RGB with these primaries (columns, XYZ under D50), grey without."""

    def fixed(values: Any) -> bytes:
        return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78) + bytes(1)
    tags = [
        (b"desc", text),
        (b"cprt", b"text" + bytes(4) + b"none"),
        (b"wtpt", b"XYZ " + bytes(4) + fixed((0.9642, 1, 0.8249))),
    ]
    if primaries is None:
        tags.append((b"kTRC", curve))
    else:
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries.T, strict=True):
            tags.append((name, b"XYZ " + bytes(4) + fixed(column)))
        tags += [(name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")]
    table, body, place = b"", b"", 132 + 12 * len(tags)
    for name, content in tags:
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", place + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s",
        place + len(body),
        b"lcms",
        0x02100000,
        b"mntr",
        b"GRAY" if primaries is None else b"RGB ",
        b"XYZ ",
    )
    header += bytes(12) + b"acsp" + bytes(28) + fixed((0.9642, 1, 0.8249))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def in_srgb(pixels: np.ndarray, gamma: float, primaries: np.ndarray) -> np.ndarray:
    """float (…, 3), 0 to 255: what these colours are in sRGB, clipped to its gamut."""
    linear = (pixels / 255.0) ** gamma @ primaries.T @ np.linalg.inv(SRGB_D50).T
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255

"""Encoded pictures become the pixels that a person sees: every format by pixel, against rules written out in NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin

from tests.data.encodings import WIDE_GAMUT, icc, in_srgb, png, saved
from tests.data.rows import encoded
from vtriune.data import pictures
from vtriune.data.schema import DataError

RANDOM = np.random.default_rng(5)
GREY = RANDOM.integers(0, 256, (6, 9), np.uint8)
RGB = RANDOM.integers(0, 256, (6, 9, 3), np.uint8)
ALPHA = RANDOM.integers(0, 256, (6, 9, 1), np.uint8)
GREY_16 = RANDOM.integers(0, 65536, (6, 9)).astype(np.uint16)
RGB_16 = RANDOM.integers(0, 65536, (6, 9, 3)).astype(np.uint16)
FRACTIONS = RANDOM.random((6, 9)).astype(np.float32)
INK = RANDOM.integers(0, 256, (6, 9, 4), np.uint8)
SMOOTH = (np.mgrid[0:64, 0:96].sum(0)[..., None] * [1.5, 1.0, 0.5]).astype(np.uint8)
PALETTE = Image.fromarray(GREY % 4, "P")
PALETTE.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0, 90, 90, 90])
COLOURS = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0], [90, 90, 90]])[GREY % 4]


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1)


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha / 255.0
    return colours * share + 255 * (1 - share)


def tiff(values: np.ndarray, white_is_zero: bool = False) -> bytes:
    return saved(values, "TIFF", tiffinfo={TiffImagePlugin.PHOTOMETRIC_INTERPRETATION: 0} if white_is_zero else {})


def bits_12(values: np.ndarray) -> bytes:
    """A TIFF of one strip, 12 bits a pixel, packed: two pixels in three bytes."""
    pairs = values.reshape(-1, 2).astype(int)
    strip = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1).astype(
        np.uint8
    )
    height, width = values.shape
    tags = [
        (256, width),
        (257, height),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, height),
        (279, strip.size),
    ]
    entries = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes() for tag, value in tags
    )
    place = 8 + strip.size + strip.size % 2
    header = b"II*\0" + np.array([place], "<u4").tobytes() + strip.tobytes() + bytes(strip.size % 2)
    return header + np.array([len(tags)], "<u2").tobytes() + entries + bytes(4)


FORMATS: dict[str, tuple[bytes, np.ndarray, float, str]] = {
    # name: file, what a person sees, how far a channel may be off, the change that is said
    "PNG of 1 bit": (png(GREY % 2, 1), grey(GREY % 2 * 255), 0, ""),
    "PNG of 2 bits": (png(GREY % 4, 2), grey(GREY % 4 * 85), 0, ""),
    "PNG, grey": (png(GREY, 8), grey(GREY), 0, ""),
    "PNG, colour": (png(RGB, 8), RGB, 0, ""),
    "PNG, grey with alpha": (png(np.dstack([GREY, ALPHA]), 8), over_white(grey(GREY), ALPHA), 1, "transparent"),
    "PNG with alpha": (png(np.dstack([RGB, ALPHA]), 8), over_white(RGB, ALPHA), 1, "transparent"),
    "PNG with an alpha of 255": (png(np.dstack([RGB, ALPHA | 255]), 8), RGB, 0, ""),
    "PNG, grey of 16 bits": (png(GREY_16, 16), grey(np.rint(GREY_16 / 257)), 0, "16 bits"),
    "PNG, colour of 16 bits": (png(RGB_16, 16), RGB_16 / 257, 1, "16 bits"),
    "PNG of 16 bits with alpha": (
        png(np.dstack([RGB_16, ALPHA.astype(np.uint16) * 257]), 16),
        over_white(RGB_16 / 257, ALPHA),
        1.5,
        "transparent",
    ),
    "PNG, grey of 16 bits with alpha": (
        png(np.dstack([GREY_16, ALPHA.astype(np.uint16) * 257]), 16),
        over_white(grey(GREY_16) / 257, ALPHA),
        1.5,
        "transparent",
    ),
    "PNG with a transparent grey": (
        png(GREY % 4 * 60, 8, (b"tRNS", b"\0\x3c")),
        grey(np.where(GREY % 4 == 1, 255, GREY % 4 * 60)),
        0,
        "transparent",
    ),
    "PNG of 16 bits with a transparent grey": (
        png((GREY % 4).astype(np.uint16) * 15420, 16, (b"tRNS", (15420).to_bytes(2))),
        grey(np.where(GREY % 4 == 1, 255, GREY % 4 * 60)),
        0,
        "transparent",
    ),
    "PNG of 16 bits with a transparent colour": (
        png(grey(GREY % 4).astype(np.uint16) * 15420, 16, (b"tRNS", (15420).to_bytes(2) * 3)),
        grey(np.where(GREY % 4 == 1, 255, GREY % 4 * 60)),
        0,
        "transparent",
    ),
    "PNG with palette": (saved(PALETTE), COLOURS, 0, ""),
    "PNG with a transparent colour in its palette": (
        saved(PALETTE, transparency=2),
        np.where(grey(GREY % 4 == 2), 255, COLOURS),
        0,
        "transparent",
    ),
    "PNG with alphas in its palette": (
        saved(PALETTE, transparency=bytes([255, 100, 0, 30])),
        over_white(COLOURS, np.array([255, 100, 0, 30])[GREY % 4][..., None]),
        1,
        "transparent",
    ),
    "PNG with a wide gamut": (
        saved(SMOOTH, icc_profile=icc(2.2, WIDE_GAMUT)),
        in_srgb(SMOOTH, 563 / 256, WIDE_GAMUT),
        2,
        "by the embedded profile",
    ),
    "PNG with alpha and a wide gamut": (
        saved(np.dstack([RGB, ALPHA]), icc_profile=icc(2.2, WIDE_GAMUT)),
        over_white(in_srgb(RGB, 563 / 256, WIDE_GAMUT), ALPHA),
        3,
        "by the embedded profile",
    ),
    "PNG, grey with a linear profile": (
        saved(GREY, icc_profile=icc(1.0, None)),
        in_srgb(grey(GREY), 1.0, np.eye(3) * [0.9642, 1, 0.8249]),
        2,
        "by the embedded profile",
    ),
    "PNG with sRGB's own profile": (
        saved(RGB, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        RGB,
        0,
        "",
    ),
    "PNG with a damaged profile": (saved(RGB, icc_profile=b"no profile" * 20), RGB, 0, "profile that cannot be used"),
    "TIFF of 12 bits": (bits_12(GREY_16[:, :8] >> 4), grey(np.rint((GREY_16[:, :8] >> 4) / 4095 * 255)), 0, "16 bits"),
    "TIFF of 16 bits": (tiff(GREY_16), grey(np.rint(GREY_16 / 257)), 0, "16 bits"),
    "TIFF of 16 bits, white is 0": (tiff(GREY_16, True), grey(255 - np.rint(GREY_16 / 257)), 0, "16 bits"),
    "TIFF of floats": (tiff(FRACTIONS), grey(np.rint(FRACTIONS * 255)), 0, "float"),
    "TIFF, colour": (saved(RGB, "TIFF"), RGB, 0, ""),
    "TIFF in CMYK": (
        saved(Image.fromarray(INK, "CMYK"), "TIFF"),
        (255.0 - INK[..., :3]) * (255.0 - INK[..., 3:]) / 255,
        1,
        "plain formula",
    ),
    "JPEG": (saved(SMOOTH, "JPEG", quality=95), SMOOTH, 6, ""),
    "JPEG, grey": (saved(SMOOTH[..., 1], "JPEG", quality=95), grey(SMOOTH[..., 1]), 6, ""),
    "JPEG in CMYK": (
        saved(Image.fromarray(np.dstack([SMOOTH, SMOOTH[..., :1] // 2]), "CMYK"), "JPEG", quality=98),
        (255.0 - SMOOTH) * (255.0 - SMOOTH[..., :1] // 2) / 255,
        6,
        "plain formula",
    ),
    "JPEG with a wide gamut": (
        saved(SMOOTH, "JPEG", quality=98, icc_profile=icc(2.2, WIDE_GAMUT)),
        in_srgb(SMOOTH, 563 / 256, WIDE_GAMUT),
        8,
        "by the embedded profile",
    ),
    "WebP, lossless": (saved(RGB, "WEBP", lossless=True), RGB, 0, ""),
    "WebP": (saved(SMOOTH, "WEBP", quality=95), SMOOTH, 8, ""),
    "WebP with alpha": (
        saved(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True),
        over_white(RGB, ALPHA),
        1,
        "transparent",
    ),
    "animated WebP": (
        saved(Image.fromarray(RGB), "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        RGB,
        0,
        "first of several frames",
    ),
    "GIF": (saved(PALETTE, "GIF"), COLOURS, 0, ""),
    "GIF with a transparent colour": (
        saved(PALETTE, "GIF", transparency=2),
        np.where(grey(GREY % 4 == 2), 255, COLOURS),
        0,
        "transparent",
    ),
    "animated GIF": (
        saved(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
        COLOURS,
        0,
        "first of several frames",
    ),
    "BMP": (saved(RGB, "BMP"), RGB, 0, ""),
    "PGM of 16 bits": (b"P5 9 6 65535\n" + GREY_16.astype(">u2").tobytes(), grey(np.rint(GREY_16 / 257)), 0, "16 bits"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_pixels_that_a_person_sees(name: str) -> None:
    data, seen, slack, change = FORMATS[name]
    image, changes = pictures.examine(data)
    assert (image.mode, image.size, pictures.size(data)) == ("RGB", seen.shape[1::-1], seen.shape[1::-1])
    assert np.abs(np.asarray(image) - seen.astype(float)).max() <= slack + 0.5 * bool(slack)
    assert any(change in line for line in changes) if change else changes == []
    np.testing.assert_array_equal(np.asarray(pictures.read(data)), np.asarray(image))


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    # TIFF 6.0: what is stored, of what is seen.
    1: lambda seen: seen,
    2: np.fliplr,
    3: lambda seen: np.rot90(seen, 2),
    4: np.flipud,
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: np.rot90(seen.swapaxes(0, 1), 2),
    8: lambda seen: np.rot90(seen, 3),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_box_drawn_on_a_turned_photo_as_displayed_is_where_it_should_be(kind: str, orientation: int) -> None:
    seen = np.zeros((64, 96, 3), np.uint8)
    seen[8:24, 40:80] = 200  # the gold box [40, 8, 80, 24]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    data = saved(np.ascontiguousarray(TURNED[orientation](seen)), kind, **options)
    image, changes = pictures.examine(data)
    assert image.size == pictures.size(data) == (96, 64)
    bright = np.argwhere(np.asarray(image)[..., 0] > 100)
    assert (*bright.min(0)[::-1], *(bright.max(0)[::-1] + 1)) == (40, 8, 80, 24)
    assert changes == ([] if orientation == 1 else ["turned as its EXIF orientation says"])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tiff(FRACTIONS * 300), r"values from .* where 0 is read as black and 1 as white"),
        (tiff(np.full((4, 4), np.nan, np.float32)), "values from nan"),
        (tiff(GREY_16.astype(np.int32)), "32-bit integers"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>404", "web page"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF"),
        (b"seven", "no picture begins with b'seven'"),
        (encoded(60, 60)[:3000], "cannot be decoded .*save it anew"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        pictures.read(data)
    assert "0x" not in str(error.value)


def test_a_picture_over_the_bound_is_refused_before_it_is_decoded() -> None:
    data = saved(RGB)
    pictures.examine(data, 54)
    with pytest.raises(DataError, match=r"9x6 px.*data\.max_source_pixels"):
        pictures.examine(data[:60], 53)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    st.floats(0, 1),
    st.sampled_from(["cut", "flip"]),
    st.integers(1, 255),
)
def test_a_damaged_picture_is_read_or_refused_by_name_and_of_a_png_no_byte_may_change(
    kind: str, where: float, damage: str, mask: int
) -> None:
    data = encoded(48, 40, kind=kind)
    place = int(where * (len(data) - 1))
    data = data[:place] if damage == "cut" else data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
    try:
        pictures.compare_checksums(data)
        assert pictures.read(data).size == pictures.size(data)
    except DataError:
        return
    assert kind != "PNG" or place >= len(data) - 13

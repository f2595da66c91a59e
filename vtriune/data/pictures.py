"""The one place where an encoded image becomes RGB pixels. The checks at load and preprocessing both call it, so a picture that was
checked is the picture that the model sees.

The rules, in the order in which they are applied:

    frames      of several the first; an iPhone's second picture (MPO) does not count as one
    depth       16 bits: value · 255 / 65535, rounded (12 bits: / 4095), of coloured PNG the high byte. Float: 0 is black, 1 is white; a
                value that does not round to a byte of that scale is refused. Integers of 32 bits have no stated white and are refused
    turning     as the EXIF or TIFF orientation says: the picture as viewers show it
    colour      by the embedded profile to sRGB; one that fits the pixels' kind no better than none is ignored, and that is said
    CMYK        without a profile by the plain formula, (255 − ink) · (255 − black) / 255
    alpha       over white, transparent colours of palettes too

Coordinates of a picture (gold boxes, `original_px`) are those of the picture turned: what a person sees who draws a box on it.
"""

import contextlib
import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin, UnidentifiedImageError

from vtriune.data.schema import DataError

# `data.max_source_pixels` is the bound, asked at the check before any pixel is decoded. Pillow's own would refuse what that allows.
Image.MAX_IMAGE_PIXELS = None

_READABLE = "PNG, JPEG, WebP, GIF, BMP and TIFF are read"
_BEGINNINGS = (
    (b"", "is empty"),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer in place of a picture: run `git lfs pull` and write the file again",
    ),
    (b"http", "is an address: fetch the picture and embed its bytes"),
    (b"<svg", "is SVG: render it as PNG"),
    (b"<", "is a web page or XML, often what a failed download left: fetch it again"),
    (b"%PDF", "is PDF: render its page as PNG"),
    (b"data:", "is a data: address as bytes: decode its base64"),
)
_HEIF = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1", b"ftyphevc")
_WHITE = {"I;16": 65535.0, "I;16B": 65535.0, "I;16L": 65535.0, "I;16N": 65535.0, "I": 65535.0, "F": 1.0}
"""Modes deeper than a byte, and the value that is white. `I` is such only in PGM, whose reader scales to 16 bits."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE_IS_ZERO = 0
"""A TIFF's PhotometricInterpretation that Pillow undoes for bytes only."""
_SAME_COLOUR = 2
"""A profile that moves no colour by more, of 255, is sRGB by another name."""


def size(data: bytes) -> tuple[int, int]:
    """(width, height) of the picture as displayed, by its header. DataError for what is no picture."""
    with _opened(data) as file:
        width, height = file.size
        # Pillow gives a TIFF's size turned.
        is_on_its_side = file.format != "TIFF" and _orientation(file, data) >= 5
        return (height, width) if is_on_its_side else (width, height)


def read(data: bytes) -> Image.Image:
    """The picture as displayed, RGB with 8 bits a channel. DataError for one that is broken or cannot be right."""
    return examine(data)[0]


def examine(data: bytes, max_pixels: int | None = None) -> tuple[Image.Image, list[str]]:
    """`read`, and by what rules the pixels are others than those in the file; a picture of more than `max_pixels` is refused unread."""
    with _opened(data) as file:
        width, height = file.size
        if max_pixels is not None and width * height > max_pixels:
            raise DataError(
                f"has {width}x{height} px, {width * height / 1e6:.0f} million, decoded anew each time it is drawn; "
                "reduce it, or raise data.max_source_pixels"
            )
        orientation = _orientation(file, data)
        changes = ["the first of several frames"] if _has_frames(file) else []
        has_16_bits = ";16" in str(getattr(file, "tile", ""))
        if file.mode in _WHITE or has_16_bits:
            changes.append("float scaled to 8 bits" if file.mode == "F" else "16 bits scaled to 8")
        file.load()
        key = file.info.get("transparency")
        if has_16_bits and isinstance(key, tuple):
            # Pillow leaves the transparent colour's 16 bits where it takes the pixels' high bytes.
            file.info["transparency"] = tuple(level >> 8 for level in key)
        image = _to_bytes(file) if file.mode in _WHITE else file
        if orientation in _TURNS:
            changes.append("turned as its EXIF orientation says")
            # Pillow turns a TIFF itself while loading it.
            image = image if file.format == "TIFF" else image.transpose(_TURNS[orientation])
        return _to_rgb(image, file, changes), changes


def compare_checksums(data: bytes) -> None:
    """DataError for a PNG of which a chunk is not what was written: its decoder does not look."""
    if data.startswith(b"\x89PNG"):
        with _opened(data) as file:
            file.verify()


def _to_rgb(image: Image.Image, file: Image.Image, changes: list[str]) -> Image.Image:
    """8-bit pixels of any mode, with `file`'s profile and transparency, as sRGB over white."""
    alpha = _alpha(image)
    if image.mode == "RGBa" or (image.mode == "P" and alpha is not None):
        image = image.convert("RGBA")
    if image.mode in ("P", "PA", "RGBA", "RGBX", "YCbCr", "HSV"):
        image = image.convert("RGB")
    elif image.mode in ("1", "LA", "La"):
        image = image.convert("L")
    image = _in_srgb(image, file.info.get("icc_profile"), changes)
    if image.mode == "CMYK":
        changes.append("CMYK without a usable profile converted by the plain formula")
    if image.mode != "RGB":
        image = image.convert("RGB")
    elif image is file:
        image = image.copy()
    if alpha is not None and alpha.histogram()[255] < alpha.width * alpha.height:
        changes.append("transparent pixels laid on white")
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return image


def _alpha(image: Image.Image) -> Image.Image | None:
    """Of each pixel how much of it covers what is below, mode L; None where nothing is transparent."""
    if image.mode == "PA" or image.mode.endswith(("A", "a")):
        return image.getchannel("A")
    key = image.info.get("transparency")
    if key is None:
        return None
    if image.mode == "1":
        image = image.convert("L")
    return image.convert("RGBA").getchannel("A")


def _to_bytes(file: Image.Image) -> Image.Image:
    """A loaded grey picture deeper than 8 bits as mode L, LA where one of its values stands for transparent."""
    white, tags = _WHITE[file.mode], getattr(file, "tag_v2", {})
    if file.mode == "I" and file.format != "PPM":
        raise DataError("holds 32-bit integers, of which no value is stated to be white; save it with 8 or 16 bits")
    if file.mode != "F" and tags:
        white = 2.0 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    values = np.asarray(file)
    scaled = values * np.float32(255.0 / white)
    if not (scaled.min() >= -0.5 and scaled.max() <= 255.5):
        found = f"from {float(values.min()):g} to {float(values.max()):g}"
        raise DataError(
            f"holds values {found}, where 0 is read as black and {white:g} as white; scale and save it anew"
        )
    grey = np.rint(scaled).clip(0, 255).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        grey = 255 - grey
    key = file.info.get("transparency")
    if not isinstance(key, int):
        return Image.fromarray(grey)
    return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))])


def _in_srgb(image: Image.Image, profile: bytes | None, changes: list[str]) -> Image.Image:
    """`image`, in RGB where a profile says what its colours are; as it is where none does."""
    if image.mode == "LAB":
        changes.append("Lab colours converted to sRGB")
        return _applied(_from_lab(), image)
    if not profile:
        return image
    space = profile[16:20]
    if image.mode == "L" and space == b"RGB ":
        image = image.convert("RGB")
    transform = _transform(profile, image.mode) if _SPACES.get(image.mode) == space else None
    if transform is None:
        changes.append("a colour profile that cannot be used ignored")
        return image
    if not transform[1]:
        return image
    changes.append("colours converted to sRGB by the embedded profile")
    return _applied(transform[0], image)


_SPACES = {"RGB": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK"}
"""An ICC header's colour space, by the mode of pixels that it speaks of."""


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform, bool] | None:
    """The way to sRGB, and whether it changes any colour; None for a profile that cannot be read."""
    # Of a grey profile lcms would make a coarse table, wrong by ten of 255 in the shadows.
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform, True
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    moved = np.asarray(_applied(transform, Image.fromarray(probe))).astype(int)
    return transform, bool(np.abs(moved - (probe if mode == "RGB" else probe[..., None])).max() > _SAME_COLOUR)


@functools.lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = Image.new("RGB", image.size)
    transform.apply(image, converted)
    return converted


def _has_frames(file: Image.Image) -> bool:
    return bool(getattr(file, "is_animated", False)) and file.format != "MPO"


def _orientation(file: Image.Image, data: bytes) -> int:
    """1 to 8, without decoding pixels; 1 where the picture does not say, or says it unreadably: viewers show it as stored, too."""
    # Pillow decodes a PNG to look for EXIF behind its pixels: only where some can be.
    if file.format == "PNG" and not any(mark in data for mark in (b"eXIf", b"Raw profile type", b"com.adobe.xmp")):
        return 1
    try:
        found = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Any: Pillow's parser raises whatever a damaged block makes it stumble over.
        return 1
    return found if found in _TURNS else 1


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The encoded picture, its pixels not decoded yet; whatever fails on it is a DataError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield image
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(_no_picture(data)) from error
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more on damaged files.
        raise DataError(
            f"cannot be decoded ({type(error).__name__}: {error}); save it anew or remove the row"
        ) from error


def _no_picture(data: bytes) -> str:
    for beginning, what in _BEGINNINGS:
        if (data.lstrip().lower().startswith(beginning.lower())) if beginning else not data:
            return what
    if data[4:12] in _HEIF:
        return f"is HEIF, which is not read: save it as JPEG or PNG ({_READABLE})"
    return f"cannot be decoded: no picture begins with {data[:12]!r} ({_READABLE})"

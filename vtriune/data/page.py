"""A page of samples as the model sees them: pictures resized, gold boxes drawn, prompts as templated. One HTML file, nothing beside."""

import base64
import html
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, ImageDraw

from verifiers import ImageSize, RewardSpec
from vtriune import whole_files
from vtriune.data import pictures
from vtriune.data.box_frames import corners, gold_frame
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import Sample
from vtriune.data.store import Store

HEAD = """<!doctype html><meta charset="utf-8"><title>samples</title><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; background: #fff; color: #222 }
section { display: grid; grid-template-columns: minmax(200px, 420px) 1fr; gap: 1em; margin: 1em 0; padding-top: 1em }
section { border-top: 1px solid #ccc }
img { max-width: 100%; display: block; margin-bottom: .3em } pre { white-space: pre-wrap; margin: 0 0 .6em } small { color: #666 }
</style>
"""
_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def write_page(path: Path, stores: Mapping[str, Store], preprocessor: Preprocessor | None, num_samples: int) -> Path:
    """`num_samples` of each source of each split, spread evenly over its rows. Returns `path`."""
    parts = [HEAD]
    for split, store in stores.items():
        # A file that an epoch shows several times has its rows several times.
        distinct = set(store.distinct_rows())
        rows = [row for row in store.spread(num_samples * len(store.index.rows_per_source)) if row in distinct]
        for source in store.index.rows_per_source:
            parts.append(f"<h2>{html.escape(f'{split}: {source}')}</h2>")
            parts += [section(store, row, preprocessor) for row in rows if store.source(row) == source]
    whole_files.write(path, "".join(parts).encode())
    return path


def section(store: Store, row: int, preprocessor: Preprocessor | None = None) -> str:
    """HTML of one sample; without `preprocessor` its pictures as displayed and its prompt as written."""
    sample, header = store.sample(row), store.header(row)
    if preprocessor is not None:
        prompt = preprocessor.prepare(sample)
        shown, sizes, text = prompt.images, prompt.image_sizes, prompt.text
        length = f" · {len(prompt.prompt_ids)} tokens"
    else:
        shown = [pictures.read(data) for data in sample.images]
        sizes = [ImageSize(image.size, image.size) for image in shown]
        text, length = "\n".join(turn.content for turn in sample.prompt), ""
    drawn = "".join(_picture(image, index, sizes, sample) for index, image in enumerate(shown))
    told = "".join(f"<pre>{html.escape(line)}</pre>" for line in _lines(sample.reward, text))
    place = html.escape(f"{header.file}, row {header.file_row}, id {sample.sample_id or '–'}{length}")
    return f"<section><div>{drawn}</div><div>{told}<small>{place}</small></div></section>"


def _lines(reward: RewardSpec, text: str) -> Iterator[str]:
    yield text
    yield f"{reward.verifier}: {reward.gold}"
    if reward.verifier_parm:
        yield f"{reward.verifier_parm}"


def _picture(image: Image.Image, index: int, sizes: list[ImageSize], sample: Sample) -> str:
    parm = sample.reward.verifier_parm or {}
    if index == (parm.get("image") or 0):
        image = _with_boxes(image, sizes[index], sample.reward)
    out = io.BytesIO()
    image.save(out, "PNG" if image.width * image.height < 10**6 else "JPEG")
    data = base64.b64encode(out.getvalue()).decode()
    original, resized = ("{}x{}".format(*size) for size in (sizes[index].original, sizes[index].resized))
    return f'<img src="data:image;base64,{data}"><small>{original} → {resized} px</small>'


def _with_boxes(image: Image.Image, size: ImageSize, reward: RewardSpec) -> Image.Image:
    """Gold boxes on the resized picture."""
    width, height = {"norm_1": (1.0, 1.0), "norm_1000": (1000.0, 1000.0), "resized_px": size.resized}.get(
        gold_frame(reward.verifier_parm), size.original
    )
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for index, (x1, y1, x2, y2) in enumerate(corners(reward)):
        box = (
            x1 * image.width / width,
            y1 * image.height / height,
            x2 * image.width / width,
            y2 * image.height / height,
        )
        draw.rectangle(box, outline=_COLOURS[index % len(_COLOURS)], width=max(1, image.width // 200))
    return image

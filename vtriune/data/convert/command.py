"""Datasets as people publish them → Parquet in this schema: `python -m vtriune.data convert FORMAT FILE … --out FOLDER`.

    coco     an instances file: rows per picture, per picture and label, or per phrase where annotations have a `caption`
    refcoco  `refs(unc).p` with `--instances` (RefCOCO+ and RefCOCOg too): a row per sentence; of the pickle plain values only
    clevr    a questions file: numbers to be counted, words to be compared
    rows     any files that a run reads (JSON lines, CSV, LLaVA, verl, TRL, …), pictures taken along

The file is named by what is in it, `train_detection_coco_118287.parquet`. What is left out is counted, with the reason.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from vtriune.config.sections.data import Files
from vtriune.data.build import build_store
from vtriune.data.convert.clevr import Clevr
from vtriune.data.convert.coco import Coco, phrases
from vtriune.data.inputs import data_files
from vtriune.data.schema import DataError, Sample
from vtriune.data.shards import write_kept, write_samples


def main(words: Sequence[str]) -> int:
    """The command line."""
    options = _parser().parse_args(words)
    console = Console(soft_wrap=True)
    if options.format == "rows":
        paths, left_out = _rows(options)
    else:
        samples, task, left_out = _samples(options)
        if options.rows is not None:
            samples = _some(samples, options.rows, options.seed)
        paths = [write_samples(samples, options.out, options.split, task, options.source or options.format)]
    for path in paths:
        console.print(f"wrote {path}", markup=False)
    for reason, number in left_out.most_common():
        console.print(f"left out: {number:,} × {reason}", markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vtriune.data convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", choices=["coco", "refcoco", "clevr", "rows"])
    parser.add_argument("files", nargs="+", type=Path, help="one file; of rows any number")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is written")
    parser.add_argument("--images", type=Path, help="folder of the pictures (the file's own)")
    parser.add_argument("--instances", type=Path, help="of refcoco: the instances file that its phrases speak of")
    parser.add_argument(
        "--per", choices=["image", "label", "phrase"], default="label", help="of coco: what a row is (label)"
    )
    parser.add_argument(
        "--frame", choices=["original_px", "norm_1000"], default="original_px", help="of boxes (original_px)"
    )
    parser.add_argument("--source", help="data_source of the rows (the format's name)")
    parser.add_argument("--verifier", help="of rows that name none")
    parser.add_argument(
        "--split", default="train", help="of refcoco the one that is read; first word of the file's name (train)"
    )
    parser.add_argument("--rows", type=int, help="at most so many, drawn evenly")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (0)")
    return parser


def _samples(options: argparse.Namespace) -> tuple[Iterable[Sample], str, Counter[str]]:
    """Rows, their task, and what is left out of them, which is known once they are written."""
    if len(options.files) != 1:
        raise DataError(f"convert {options.format}: name one file")
    path, source = options.files[0], options.source or options.format
    folder = options.images or path.parent
    if options.format == "clevr":
        clevr = Clevr(path, folder, source)
        return clevr.rows(), "puzzle", clevr.left_out
    instances = options.instances if options.format == "refcoco" else path
    if instances is None:
        raise DataError("convert refcoco: say --instances, the file that the phrases speak of")
    coco = Coco(instances, folder, options.frame, source)
    if options.format == "refcoco":
        return phrases(path, coco, options.split), "grounding", coco.left_out
    rows = {"image": coco.per_image, "label": coco.per_label, "phrase": coco.per_phrase}[options.per]()
    return rows, "grounding" if options.per == "phrase" else "detection", coco.left_out


def _some(samples: Iterable[Sample], num_rows: int, seed: int) -> Iterator[Sample]:
    """A reservoir of so many, in their order (Vitter, 1985)."""
    rng, kept = random.Random(seed), list[tuple[int, Sample]]()
    for number, sample in enumerate(samples):
        if len(kept) < num_rows:
            kept.append((number, sample))
        elif (place := rng.randrange(number + 1)) < num_rows:
            kept[place] = (number, sample)
    return (sample for _, sample in sorted(kept, key=lambda pair: pair[0]))


def _rows(options: argparse.Namespace) -> tuple[list[Path], Counter[str]]:
    given = Files(files=[str(path) for path in options.files], source=options.source, verifier=options.verifier)
    store = build_store(data_files("convert", [given]), options.out / "stores", on_bad_row="quarantine")
    rows = store.distinct_rows()
    if options.rows is not None and options.rows < len(rows):
        rows = sorted(random.Random(options.seed).sample(rows, options.rows))
    left_out = Counter({f"a row that cannot be read, see {store.quarantine_path}": store.index.num_quarantined})
    return write_kept(store, rows, options.out), +left_out

"""Whether data will train well: `python -m vtriune.data check FILE|FOLDER … [--test FILE …] [--model FOLDER] [--html]`, or
`python -m vtriune.data check cluster.yaml [--html]`: the files, model and bounds of a run's file.

Every row is read and checked as a run would, and every source is told in a table. In a table four figures with dots between are least,
median, 95th percentile and largest. Rows that cannot be trained on are listed with their reasons, and written to
`OUT/quarantine.parquet`; `--html` writes `OUT/samples.html`, samples as the model sees them. The stores stay in `OUT`, so that a second
look at the same files is quick.

Exit code: 0 all rows can be trained on, 1 some cannot, 2 the files cannot be read or no row is left.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from verifiers import RewardOptions
from vtriune.config import load, resolve
from vtriune.config.sections.data import Data, Files
from vtriune.data import survey
from vtriune.data.build import BadRow, Input, build_store
from vtriune.data.findings import Tally
from vtriune.data.inputs import data_files
from vtriune.data.page import write_page
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import DataError, parse_file_name
from vtriune.data.store import Store
from vtriune.data.validate import Checks

_ABOUT_OUTPUT = ("--out", "--html", "--samples")
_HELD_OUT = ("test", "val", "validation", "dev", "eval")
_QUARANTINE = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("source", pa.string()), ("sample_id", pa.string()),
     ("reasons", pa.list_(pa.string())), ("prompt", pa.string())]
)  # fmt: skip


def main(words: Sequence[str]) -> int:
    """The command line."""
    options = _parser().parse_args(words)
    if options.files and options.files[0].endswith((".yaml", ".yml")):
        _take_run(options, words)
    console = Console()
    preprocessor = _preprocessor(options)
    splits = _splits(options)
    stores = {
        split: _store(split, inputs, options, preprocessor, console) for split, inputs in splits.items() if inputs
    }
    for shown in survey.report(stores, options.max_prompt_tokens if preprocessor else None):
        console.print(shown)
    for split, store in stores.items():
        for source, notes in store.index.notes.items():
            for note in notes:
                console.print(f"{split}: {source}: {note}", markup=False)
    if options.html:
        page = write_page(options.out / "samples.html", stores, preprocessor, options.samples)
        console.print(f"samples as the model sees them: {page}")
    return 1 if _tell_bad_rows(list(stores.values()), options.out, console) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vtriune.data check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    bounds = Data()
    parser.add_argument(
        "files",
        nargs="*",
        help="files, folders or patterns, of which those named test or val are held out; or a run's YAML file",
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="held-out files")
    parser.add_argument("--model", type=Path, help="model folder: measures prompts and what pictures are resized to")
    parser.add_argument("--min-pixels", type=int, default=bounds.min_pixels, help="as data.min_pixels")
    parser.add_argument("--max-pixels", type=int, default=bounds.max_pixels, help="as data.max_pixels")
    parser.add_argument(
        "--max-prompt-tokens", type=int, default=bounds.max_prompt_tokens, help="as data.max_prompt_tokens"
    )
    parser.add_argument(
        "--max-source-pixels", type=int, default=bounds.max_source_pixels, help="as data.max_source_pixels"
    )
    parser.add_argument("--source", help="of all rows, as in an entry of data.train")
    parser.add_argument("--verifier", help="as in an entry of data.train")
    parser.add_argument("--verifier-parm", type=json.loads, help="as in an entry of data.train, JSON")
    parser.add_argument("--frame", choices=["original_px", "resized_px", "norm_1000", "norm_1"], help="of gold boxes")
    parser.add_argument("--python", action="append", default=[], metavar="MODULE:FUNCTION", help="as in rewards.python")
    parser.add_argument("--out", type=Path, default=Path("data-check"), help="folder of what is written (data-check)")
    parser.add_argument("--html", action="store_true", help="write a page of samples")
    parser.add_argument("--samples", type=int, default=8, help="samples of each source on that page (8)")
    parser.set_defaults(of_run=None)
    return parser


def _take_run(options: argparse.Namespace, words: Sequence[str]) -> None:
    """As the run would read and check its data. DataError for words beside the run's file that it says itself."""
    said = [word for word in words if word.startswith("--") and word.partition("=")[0] not in _ABOUT_OUTPUT]
    if said or len(options.files) > 1:
        beside = said[0] if said else options.files[1]
        raise DataError(
            f"{beside} beside a run's file, which says itself what is read: write it there, or name files only"
        )
    options.of_run = resolve(load(options.files[0]))
    data = options.of_run.data
    options.model = options.of_run.model.path
    for name in ("min_pixels", "max_pixels", "max_prompt_tokens", "max_source_pixels"):
        setattr(options, name, getattr(data, name))


def _preprocessor(options: argparse.Namespace) -> Preprocessor | None:
    if options.model is None:
        return None
    return Preprocessor(options.model, options.min_pixels, options.max_pixels, options.max_prompt_tokens)


def _splits(options: argparse.Namespace) -> dict[str, list[Input]]:
    if options.of_run is not None:
        data, held_out = options.of_run.data, options.of_run.evaluation.files or options.of_run.data.test
        return {"train": data_files("data.train", data.train), "held out": data_files("data.test", held_out)}
    said = {
        "source": options.source, "verifier": options.verifier, "verifier_parm": options.verifier_parm, "frame": options.frame,
    }  # fmt: skip
    named, test = (
        data_files("check", [Files(files=files, **said)]) if files else [] for files in (options.files, options.test)
    )
    if not named and not test:
        raise DataError("no file named: python -m vtriune.data check FILE …")
    held_out = [given for given in named if _is_held_out(given.path)]
    return {"train": [given for given in named if given not in held_out], "held out": held_out + test}


def _is_held_out(path: Path) -> bool:
    name = parse_file_name(path)
    return name.split in _HELD_OUT if name is not None else path.parent.name in _HELD_OUT


def _store(
    split: str, inputs: list[Input], options: argparse.Namespace, preprocessor: Preprocessor | None, console: Console
) -> Store:
    checks = Checks(
        preprocessor=preprocessor,
        options=RewardOptions(python=tuple(options.python))
        if options.of_run is None
        else options.of_run.rewards.options,
        prompt_pool=split == "train" and (options.of_run is None or options.of_run.data.prompt_pool),
        max_source_pixels=options.max_source_pixels,
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(split, total=None)
        store = build_store(
            inputs, options.out / "stores", checks=checks, on_bad_row="quarantine",
            tell=lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    for form, files in store.forms().items():
        console.print(f"{split}: {len(files)} file{'s' * (len(files) > 1)} read as {form}")
    return store


def _bad_rows(stores: Sequence[Store]) -> Iterator[BadRow]:
    for path in (store.quarantine_path for store in stores):
        if path is not None:
            with path.open("rb") as file:
                yield from (msgspec.json.decode(line, type=BadRow) for line in file)


def _tell_bad_rows(stores: Sequence[Store], out: Path, console: Console) -> int:
    """Prints and writes them; how many there are."""
    bad = list(_bad_rows(stores))
    target = out / "quarantine.parquet"
    if not bad:
        target.unlink(missing_ok=True)
        console.print("every row can be trained on")
        return 0
    tally = Tally()
    for row in bad:
        for reason in row.reasons:
            tally.add(reason, row.file, row.row)
    console.print(f"{len(bad)} rows cannot be trained on:", *tally.lines(), sep="\n", markup=False)
    pq.write_table(pa.Table.from_pylist([msgspec.to_builtins(row) for row in bad], schema=_QUARANTINE), target)
    console.print(f"they are in {target}")
    return len(bad)

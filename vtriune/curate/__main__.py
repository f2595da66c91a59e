"""Keep the rows that are worth training on: `python -m vtriune.curate FILE|FOLDER … --out FOLDER --rule NAME[=X] …`.

Rules are applied in the order in which they are named; a row goes by the first that drops it. `--paper` names the paper's. Rules about
difficulty look at answers: those of recorded runs (`--run runs/mine`, written by vtriune.launch), or answers that are sampled for it
(`--sample cluster.yaml --answers 8`: model, sampling and rewards of a run's file). Rows are known by source and sample id.
Kept rows are written to Parquet in this schema, a file for each one that was read; `report.html` says what each rule dropped, with
examples.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from verifiers import terminal
from vtriune.config.load import ConfigError, load
from vtriune.config.sections.data import Data, Files
from vtriune.config.tree import Config
from vtriune.curate.balance import BALANCES
from vtriune.curate.difficulty import Difficulty, Key, difficulties
from vtriune.curate.report import Dropped, with_parameter, write_report
from vtriune.curate.rules import RULES, Candidate
from vtriune.curate.sampling import sample_difficulties
from vtriune.data import measures
from vtriune.data.build import build_store
from vtriune.data.inputs import data_files
from vtriune.data.processing import Preprocessor
from vtriune.data.schema import DataError
from vtriune.data.shards import write_kept
from vtriune.data.store import Store
from vtriune.data.validate import Checks
from vtriune.record import open_run

PAPER = (
    "multiple_choice", "true_false", "answer_symbols", "answer_length", "query_length", "boxes_per_label", "box_area",
    "phrase_words", "ocr_verifies", "solved", "boxes_too_hard", "boxes_too_easy", "single_to_multi",
)  # fmt: skip


class Asked(NamedTuple):
    """A rule and its parameter."""

    name: str
    parameter: float


def main(words: Sequence[str] | None = None) -> int:
    """The command line. 2: the data cannot be read, or no rule has that name."""
    options = _parser().parse_args(words)
    try:
        asked = _asked([*(PAPER if options.paper else ()), *options.rule])
        config = load(options.sample) if options.sample is not None else None
        store = _store(options, config)
        found = _difficulties(options.run)
        if config is not None:
            found = _added(found, sample_difficulties(config, store.folder, options.answers))
        kept, dropped = curate(candidates(store, found), asked, options.seed)
        paths = write_kept(store, [candidate.sample.row for candidate in kept], options.out)
    except (DataError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    report = write_report(options.out / "report.html", asked, dropped, store, kept)
    console = Console()
    console.print(
        f"{len(kept)} of {len(kept) + len(dropped)} rows kept, in {len(paths)} files; {report} says why", markup=False
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    told = {name: with_parameter(rule.about, rule.default) for name, rule in RULES.items()}
    told |= {name: with_parameter(about, default) for name, (about, default, _) in BALANCES.items()}
    rules = "\n".join(f"  {name:17} {about}" for name, about in told.items())
    parser = argparse.ArgumentParser(
        prog="python -m vtriune.curate", description=f"{__doc__}\nA row goes where:\n{rules}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("files", nargs="+", help="files, folders or patterns")
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--rule", action="append", default=[], metavar="NAME[=X]")
    parser.add_argument("--paper", action="store_true", help=f"the rules {', '.join(PAPER)}")
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="a recorded run, for rules about difficulty"
    )
    parser.add_argument("--sample", type=Path, metavar="FILE", help="a run's file: its model answers every row")
    parser.add_argument("--answers", type=_positive, default=8, help="that are sampled of a row (8)")
    parser.add_argument("--model", type=Path, help="model folder: measures prompts, for query_length")
    parser.add_argument("--verifier", help="of rows that name none")
    parser.add_argument("--seed", type=int, default=0, help="of what balance rules draw (0)")
    return parser


def _positive(word: str) -> int:
    if (number := int(word)) < 1:
        raise ValueError
    return number


def _asked(words: Iterable[str]) -> list[Asked]:
    asked = []
    for word in words:
        name, _, value = word.partition("=")
        default = RULES[name].default if name in RULES else BALANCES[name][1] if name in BALANCES else None
        if default is None:
            raise DataError(f"no rule {name}; there are {', '.join([*RULES, *BALANCES])}")
        try:
            asked.append(Asked(name, float(value) if value else default))
        except ValueError:
            raise DataError(f"--rule {word}: {value!r} is no number") from None
    if not asked:
        raise DataError("no rule named: --rule NAME, or --paper")
    return asked


def _store(options: argparse.Namespace, config: Config | None) -> Store:
    """What `config` says of model, pictures and rewards holds where there is one."""
    model, bounds = (options.model, Data()) if config is None else (Path(config.model.path), config.data)
    preprocessor = Preprocessor(model, bounds.min_pixels, bounds.max_pixels, 2**20) if model is not None else None
    inputs = data_files("curate", [Files(files=options.files, verifier=options.verifier)])
    checks = Checks(preprocessor, None if config is None else config.rewards.options)
    return build_store(inputs, options.out / "stores", checks=checks, on_bad_row="quarantine")


def _difficulties(runs: Iterable[Path]) -> dict[Key, Difficulty]:
    found: dict[Key, Difficulty] = {}
    for folder in runs:
        run = open_run(folder)
        found = _added(found, difficulties(run.answers("version"), run.config.rewards.options))
    return found


def _added(some: dict[Key, Difficulty], more: dict[Key, Difficulty]) -> dict[Key, Difficulty]:
    """Both, summed over rows that both know."""
    none = Difficulty(0, 0, 0.0)
    pairs = {key: (some.get(key, none), more.get(key, none)) for key in {**some, **more}}
    return {
        key: Difficulty(a.num_answers + b.num_answers, a.num_right + b.num_right, a.accuracy + b.accuracy)
        for key, (a, b) in pairs.items()
    }


def candidates(store: Store, found: dict[Key, Difficulty]) -> list[Candidate]:
    """Every stored row once, with what is known of it; pictures are left out."""
    rows = store.distinct_rows()
    told = []
    for row, each in zip(rows, measures.read(store.folder), strict=True):
        sample = store.sample(row, with_images=False)
        sizes = each.sizes if each is not None else []
        tokens = each.prompt_tokens if each is not None else None
        told.append(Candidate(sample, sizes, tokens, found.get((sample.source, sample.sample_id))))
    return told


def curate(rows: Sequence[Candidate], asked: Sequence[Asked], seed: int) -> tuple[list[Candidate], list[Dropped]]:
    """What is kept, in order, and what is dropped by which rule."""
    kept, dropped = list(rows), list[Dropped]()
    for name, parameter in asked:
        if name in RULES:
            gone = {place for place, row in enumerate(kept) if RULES[name].drops_row(row, parameter)}
        else:
            gone = BALANCES[name][2](kept, parameter, seed)
        dropped += [Dropped(name, kept[place]) for place in sorted(gone)]
        kept = [row for place, row in enumerate(kept) if place not in gone]
    return kept, dropped


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

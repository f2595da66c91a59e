"""Score archived responses anew: `python -m verifiers.rescore rollouts.parquet [-o scored.parquet] [--options '{…}']`.

Reads a Parquet file with a column of responses and a column of reward specs (a struct like a data row's `reward_model`, or its
JSON), and writes it back with the verdicts beside: `verdict_status`, `verdict_reward`, `verdict_accuracy`, `verdict_format`,
`verdict_correct`, `verdict_reason`, `verdict_components` (JSON). A fault has null scores. Memory does not grow with the file.

A run's archive holds all that its rewards came from, under the names of `verifiers.columns`: its rescored rewards are the archived
ones, of training by each row's progress, of evaluations by the evaluation's threshold. `--options` replaces single options. Texts that
the archive leaves to its tokenizer stand in the file that is written.
"""

import argparse
import asyncio
import contextlib
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from verifiers import columns, terminal, whole_files
from verifiers.pool.pool import VerifierPool
from verifiers.registry import SpecError
from verifiers.scoring import is_correct, spec_from_row
from verifiers.texts import FileError, decoder_of, filled
from verifiers.types import RewardOptions, RewardSpec, Verdict

BATCH_ROWS = 512
SCORES = ("reward", "accuracy", "format")


def read_spec(value: Any, where: str) -> RewardSpec:
    """The spec of one row, from a struct or from JSON; FileError names the row."""
    try:
        return spec_from_row(msgspec.json.decode(value, type=dict[str, Any]) if isinstance(value, str) else value)
    except (msgspec.DecodeError, SpecError, AttributeError, TypeError) as error:
        raise FileError(f"{where}: no reward spec: {error}") from error


def options_of(source: Path, given: dict[str, Any]) -> RewardOptions:
    """The reward options in the file's metadata, with those `given` in their place; the library's where there are none.

    Which functions may run is never taken from a file, that anybody may have written: FileError asks for them.
    """
    stored = (pq.read_metadata(source).metadata or {}).get(columns.OPTIONS.encode(), b"{}")
    found = msgspec.json.decode(stored, type=dict[str, Any])
    if found.get("python") and "python" not in given:
        allowed = f"--options '{msgspec.json.encode({'python': found['python']}).decode()}'"
        raise FileError(f"{source}: its rows were scored by functions of your own; to let them run, add {allowed}")
    return msgspec.convert({**found, **given}, RewardOptions)


async def score_rows(
    pool: VerifierPool, table: pa.Table, names: dict[str, str], where: str, first: int
) -> tuple[list[Verdict], list[bool]]:
    """Verdicts of a batch that starts at row `first` of the file `where`, each under its row's progress, and which are correct.

    FileError for a row without a spec.
    """

    def column(name: str, absent: Any) -> list[Any]:
        return table[name].to_pylist() if name in table.column_names else [absent] * len(table)

    specs = [
        read_spec(value, f"{where}, row {first + index}, column {names['spec']!r}")
        for index, value in enumerate(column(names["spec"], None))
    ]
    responses = [text or "" for text in column(names["response"], "")]
    sources, progress = column(names["source"], ""), column(columns.PROGRESS, None)
    sizes = [columns.sizes_of(value) for value in column(columns.IMAGE_SIZES, None)]
    verdicts: dict[int, Verdict] = {}
    for value in dict.fromkeys(progress):
        rows = [row for row, of_row in enumerate(progress) if of_row == value]
        shares: list[list[Any]] = [[items[row] for row in rows] for items in (responses, specs, sources, sizes)]
        verdicts.update(zip(rows, await pool.score(shares[0], shares[1], value, *shares[2:]), strict=True))
    ordered = [verdicts[row] for row in range(len(table))]
    return ordered, [is_correct(*pair, options=pool.options) for pair in zip(ordered, specs, strict=True)]


def with_verdicts(table: pa.Table, verdicts: list[Verdict], are_correct: list[bool]) -> pa.Table:
    """The table with the verdict columns; those it had are replaced."""
    # From pandas: NaN becomes null.
    added = {name: pa.array([getattr(v, name) for v in verdicts], pa.float64(), from_pandas=True) for name in SCORES}
    added["status"] = pa.array([verdict.status for verdict in verdicts])
    added["reason"] = pa.array([verdict.reason for verdict in verdicts])
    added["correct"] = pa.array(are_correct)
    added["components"] = pa.array([msgspec.json.encode(verdict.components).decode() for verdict in verdicts])
    beside = {f"verdict_{name}": column for name, column in added.items()}
    table = table.drop_columns([name for name in beside if name in table.column_names])
    for name, column in beside.items():
        table = table.append_column(name, column)
    return table


async def rescore(
    source: Path, target: Path, pool: VerifierPool, names: dict[str, str], progress: Progress
) -> Counter[str]:
    """Score `source` into `target`; counts of verdicts by status, and of correct ones. FileError for a row without a spec, or texts
    without their tokenizer.

    `names` maps `response`, `spec` and `source` to columns. The target appears when it is complete.
    """
    counts: Counter[str] = Counter()
    decoder = decoder_of(source) if names["response"] == columns.RESPONSE else None
    with whole_files.replacing(target) as partial, pq.ParquetFile(source) as file, contextlib.ExitStack() as written:
        bar, done, writer = progress.add_task(escape(source.name), total=file.metadata.num_rows), 0, None
        for batch in file.iter_batches(BATCH_ROWS):
            table = filled(pa.Table.from_batches([batch]), decoder)
            verdicts, are_correct = await score_rows(pool, table, names, str(source), done)
            scored = with_verdicts(table, verdicts, are_correct)
            if writer is None:
                writer = written.enter_context(pq.ParquetWriter(partial, scored.schema))
                writer.add_key_value_metadata({columns.OPTIONS: msgspec.json.encode(pool.options).decode()})
            writer.write_table(scored)
            counts.update(verdict.status for verdict in verdicts)
            counts["correct"] += sum(are_correct)
            done += len(verdicts)
            progress.update(bar, completed=done)
    return counts


async def run(arguments: argparse.Namespace, console: Console) -> None:
    """Start a pool, rescore, close the pool, say what came out."""
    source: Path = arguments.file
    target = arguments.output or source.with_suffix(".scored.parquet")
    names = {"response": arguments.response, "spec": arguments.spec, "source": arguments.source}
    try:
        found = pq.read_schema(source).names
    except pa.ArrowInvalid as error:
        raise FileError(f"{source}: is no whole Parquet file ({error})") from error
    missing = sorted({names["response"], names["spec"]} - set(found))
    if missing:
        raise FileError(f"{source}: no column {missing}; it has {found}")
    options = options_of(source, msgspec.json.decode(arguments.options, type=dict[str, Any]))
    pool = VerifierPool(arguments.workers, options, fault_limit=1.0)
    try:
        await pool.start()
        shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*shown, console=console) as progress:
            counts = await rescore(source, target, pool, names, progress)
    finally:
        await pool.close()
    told = ", ".join(f"{counts[name]} {name}" for name in ("ok", "bad_answer", "fault", "correct"))
    console.print(f"{told}; written to {target}", markup=False, soft_wrap=True)


def main() -> int:
    """The command line; the exit status is 1 where the file cannot be scored, 2 for a wrong command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: FILE.scored.parquet beside it")
    parser.add_argument("--response", default=columns.RESPONSE, help="column of responses")
    parser.add_argument("--spec", default=columns.SPEC, help="column of reward specs")
    parser.add_argument("--source", default=columns.SOURCE, help="column of data sources, if there is one")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--options", default="{}", help="rewards.* options as a JSON object, in place of the file's")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: at least 1")
    console = Console()
    try:
        asyncio.run(run(arguments, console))
    except (FileError, OSError, msgspec.DecodeError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

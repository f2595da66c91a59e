"""Score archived responses anew: `python -m verifiers.rescore rollouts.parquet [-o scored.parquet] [--workers 2]`.

Reads a Parquet file with a column of responses and a column of reward specs (a struct like a data row's `reward_model`, or
its JSON), and writes it back with the verdicts beside: `verdict_status`, `verdict_reward`, `verdict_accuracy`,
`verdict_format`, `verdict_reason`, `verdict_components` (JSON). A fault has null scores. Works in batches: memory does not grow
with the file.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from verifiers.pool import VerifierPool
from verifiers.registry import SpecError
from verifiers.scoring import spec_from_row
from verifiers.types import RewardOptions, RewardSpec, Verdict

BATCH_ROWS = 512
SCORE_TYPES = {
    "status": pa.string(),
    "reward": pa.float64(),
    "accuracy": pa.float64(),
    "format": pa.float64(),
    "reason": pa.string(),
}


class FileError(ValueError):
    """The file lacks a column, or holds a row that is no reward spec; the message names file, column and row."""


def read_spec(value: Any, where: str) -> RewardSpec:
    """The spec of one row, from a struct or from JSON; FileError names the row."""
    try:
        return spec_from_row(msgspec.json.decode(value, type=dict[str, Any]) if isinstance(value, str) else value)
    except (msgspec.DecodeError, SpecError, AttributeError, TypeError) as error:
        raise FileError(f"{where}: no reward spec: {error}") from error


def with_verdicts(table: pa.Table, verdicts: list[Verdict]) -> pa.Table:
    """The table with the verdict columns; those it had are replaced."""
    columns = {
        f"verdict_{name}": pa.array([_plain(getattr(v, name)) for v in verdicts], kind)
        for name, kind in SCORE_TYPES.items()
    }
    columns["verdict_components"] = pa.array([msgspec.json.encode(v.components).decode() for v in verdicts])
    for name, column in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        table = table.append_column(name, column)
    return table


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


async def rescore(
    source: Path, target: Path, pool: VerifierPool, names: dict[str, str], progress: Progress
) -> Counter[str]:
    """Score `source` into `target`; counts of verdicts by status. FileError for a row without a spec.

    `names` maps `response`, `spec` and `source` to columns. The target appears when it is complete.
    """
    counts: Counter[str] = Counter()
    partial = target.with_name(f".{target.name}.partial")
    writer: pq.ParquetWriter | None = None
    with pq.ParquetFile(source) as file:
        bar = progress.add_task(source.name, total=file.metadata.num_rows)
        try:
            for batch in file.iter_batches(BATCH_ROWS):
                table = pa.Table.from_batches([batch])
                done = sum(counts.values())
                specs = [
                    read_spec(value, f"{source}, row {done + i}, column {names['spec']!r}")
                    for i, value in enumerate(table[names["spec"]].to_pylist())
                ]
                responses = [text or "" for text in table[names["response"]].to_pylist()]
                sources = table[names["source"]].to_pylist() if names["source"] in table.column_names else None
                verdicts = await pool.score(responses, specs, None, sources)
                scored = with_verdicts(table, verdicts)
                writer = writer or pq.ParquetWriter(partial, scored.schema)
                writer.write_table(scored)
                counts.update(verdict.status for verdict in verdicts)
                progress.advance(bar, len(verdicts))
        finally:
            if writer is not None:
                writer.close()
    if writer is not None:
        os.replace(partial, target)
    return counts


def check_columns(source: Path, names: dict[str, str]) -> None:
    """FileError where the file lacks the column of responses or of specs."""
    found = pq.read_schema(source).names
    missing = sorted({names["response"], names["spec"]} - set(found))
    if missing:
        raise FileError(f"{source}: no column {missing}; it has {found}")


async def run(arguments: argparse.Namespace, options: RewardOptions, console: Console) -> Counter[str]:
    """Start a pool, rescore, close the pool."""
    target = arguments.output or arguments.file.with_suffix(".scored.parquet")
    names = {"response": arguments.response, "spec": arguments.spec, "source": arguments.source}
    check_columns(arguments.file, names)
    pool = VerifierPool(arguments.workers, options, fault_limit=1.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        await pool.start()
        with Progress(*columns, console=console) as progress:
            counts = await rescore(arguments.file, target, pool, names, progress)
    finally:
        await pool.close()
    table = Table("verdict", "responses")
    for status in ("ok", "bad_answer", "fault"):
        table.add_row(status, str(counts[status]))
    console.print(table, f"written to {target}")
    return counts


def main() -> int:
    """The command line; the exit status is 1 where the file cannot be scored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="default: FILE.scored.parquet beside it")
    parser.add_argument("--response", default="response", help="column of responses")
    parser.add_argument("--spec", default="reward_model", help="column of reward specs")
    parser.add_argument("--source", default="data_source", help="column of data sources, if there is one")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--options", default="{}", help="rewards.* options as a JSON object")
    arguments = parser.parse_args()
    console = Console()
    try:
        asyncio.run(run(arguments, msgspec.json.decode(arguments.options, type=RewardOptions), console))
    except (FileError, OSError, msgspec.DecodeError) as error:
        console.print(f"[red]{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

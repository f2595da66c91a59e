"""Run the paper's comparisons in small and report them: `python -m examples.digits.ablations NAME [--seeds 3] [--jobs 2]`, `--report`,
`--list`.

Resumable over days: every finished run is a line of `docs/claims/results.jsonl` and a file of rows beside it; what is there for the
same data, model and settings is not run again, and a run that was interrupted goes on. `--report` writes `docs/claims.md`.
"""

import argparse
import datetime as dt
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import describe
from examples.digits import claims, held_out
from examples.digits.arms import ABLATIONS, ARMS, BOXES
from examples.digits.build import DATA_FOLDER
from examples.digits.micro_vlm import MODEL_FOLDER
from verifiers import terminal
from vtriune import whole_files

FILE = Path("examples/digits.yaml")
RUNS = Path("runs/ablations")
TABLE = Path("docs/claims")
NUM_HELD_OUT = 1024
Launch = Callable[[Sequence[str]], int]
_TABLE = threading.Lock()
"""Held while the table is read and written anew."""


def command(arm: str, seed: int, num_versions: int) -> list[str]:
    """The words of `python -m vtriune.launch` for one run."""
    return [
        str(FILE),
        f"run.folder={RUNS}",
        f"run.name={run_name(arm, seed, num_versions)}",
        f"run.seed={seed}",
        f"run.steps={num_versions}",
        f"evaluation.rows={NUM_HELD_OUT}",
        "evaluation.every=0",
        f"checkpoint.every={num_versions}",
        *ARMS[arm],
    ]


def run_name(arm: str, seed: int, num_versions: int) -> str:
    """Of the run's folder."""
    return f"{''.join(each if each.isalnum() else '-' for each in arm)}-{num_versions}-seed-{seed}"


def fingerprint(arm: str, seed: int, num_versions: int) -> str:
    """What a run's result follows from, apart from the product's own code: settings, shipped file, model and data."""
    digest = hashlib.sha256(json.dumps(command(arm, seed, num_versions)).encode())
    for path in (FILE, MODEL_FOLDER / "model.safetensors", *sorted(DATA_FOLDER.rglob("*.parquet"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(arm: str, seed: int, num_versions: int, launch: Launch, table: Path = TABLE) -> str:
    """Make one result unless it is there. Returns what was done."""
    identity = fingerprint(arm, seed, num_versions)
    known = [line for line in claims.read(table) if claims.key(line) == (arm, seed, num_versions)]
    if any(line["fingerprint"] == identity for line in known):
        return "is in the table"
    started = time.monotonic()
    if code := launch(command(arm, seed, num_versions)):
        raise SystemExit(f"{run_name(arm, seed, num_versions)} ended with exit code {code}; the same command goes on")
    folder = RUNS / run_name(arm, seed, num_versions)
    line = {
        "arm": arm,
        "seed": seed,
        "num_versions": num_versions,
        "fingerprint": identity,
        "overrides": list(ARMS[arm]),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "date": dt.date.today().isoformat(),
        "machine": describe()["machine"],
        "wall_s": round(time.monotonic() - started),
        "rows": f"{run_name(arm, seed, num_versions)}.npz",
        **figures(folder),
    }
    table.mkdir(parents=True, exist_ok=True)
    with whole_files.replacing(table / str(line["rows"])) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **rows(folder))
    with _TABLE:
        kept = [other for other in claims.read(table) if claims.key(other) != claims.key(line)]
        text = "".join(json.dumps(each) + "\n" for each in [*kept, line])
        whole_files.write(table / claims.RESULTS, text.encode())
    return f"{'replaced: of other data, model or file' if known else 'done'}, {line['wall_s']} s"


def figures(folder: Path) -> dict[str, Any]:
    """Of a run's lines: IoU@50 of training's box answers by version, and the gradient norms of its last line."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [f"source/{source}/component/label_first_iou@50" for source in BOXES]
    early = [np.mean([line[key] for key in keys if key in line]) for line in lines if any(key in line for key in keys)]
    return {
        "training_iou50": [round(float(each), 4) for each in early],
        "reward": [round(line["reward/mean"], 4) for line in lines if "reward/mean" in line],
        "grad_norms": {key: value for key, value in lines[-1].items() if key.startswith("grad_norm")},
    }


def rows(folder: Path) -> dict[str, np.ndarray]:
    """kind/source/figure/before and after: (rows,) in the order of sample ids."""
    before, after = held_out.first_and_last(folder)
    return {
        f"{kind}/{source}/{name}/{when}": side[kind, source].figures[name].astype(np.float32)
        for when, side in (("before", before), ("after", after))
        for kind, source in side
        for name in side[kind, source].figures
    }


def launch_run(words: Sequence[str]) -> int:
    """The product's own command, its output on this terminal."""
    return subprocess.run([sys.executable, "-m", "vtriune.launch", *words], check=False).returncode


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ABLATIONS)}")
    parser.add_argument("--seeds", type=int, help="runs of every arm; as many as the ablation has")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time; each trains and generates in turn, so two fit two cores"
    )
    parser.add_argument("--list", action="store_true", help="say what there is and what is done")
    parser.add_argument("--report", action="store_true", help="write docs/claims.md and its pictures from the table")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(ABLATIONS)):
        raise SystemExit(f"no ablation {', '.join(unknown)}; there are {', '.join(ABLATIONS)}")
    done = {claims.key(line) for line in claims.read(TABLE)}
    names = options.names or (ABLATIONS if options.list else ())
    # An arm may stand in several. Seed by seed, so that every arm has one before any has two.
    asked = {
        (arm, seed, each.num_versions): name
        for name in names
        for each in [ABLATIONS[name]]
        for seed in range(options.seeds or each.num_seeds)
        for arm in each.arms
    }

    def settle(one: tuple[str, int, int]) -> None:
        what = ("done" if one in done else "to do") if options.list else run(*one, launch_run, TABLE)
        print(f"{asked[one]}: {run_name(*one)}: {what}", flush=True)

    with ThreadPoolExecutor(1 if options.list else options.jobs) as pool:
        for ended in [pool.submit(settle, one) for one in asked]:
            ended.result()
    if options.report:
        print(claims.report(TABLE))


if __name__ == "__main__":
    terminal.open_output()
    main()

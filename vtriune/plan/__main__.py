"""What asynchrony buys before a cluster is rented: `python -m vtriune.plan [--gpus 8,64,512,4096] [--json FILE]`.

Two parts. The event model against published figures of other systems, where their inputs are public; then, per number of GPUs, the
split between generation and training, the staleness and the batch that give most. `python -m bench.device_time` holds the model
against the real control plane.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from verifiers import terminal
from vtriune.plan.fleet import Candidate, Hardware, candidates, is_sensible
from vtriune.plan.published import NOT_REPRODUCED, SPREADS, verl_rows

NOTICE = "EVENT MODEL on a virtual clock, from declared costs of a 7B model on H100s (vtriune/plan: simulated_device.py, fleet.py)."


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    print(NOTICE)
    result = {"notice": NOTICE, "published": _compare(), "plan": _plan(options)}
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2))
    return 0


def _compare() -> dict[str, Any]:
    """Published figures."""
    print(
        "\nverl (docs/advance/fully_async.md of verl-project/verl), 128 H20, 64 : 64, Qwen2.5-Math-7B, seconds per parameter sync;\n"
        "synchronous 356.3 s. Modelled from its public inputs; the spread σ of the lengths is not public:"
    )
    print(f"  {'stale share':<14}{'published':>12}" + "".join(f"{f'σ {sigma}':>18}" for sigma in SPREADS))
    rows = verl_rows()
    for row in rows:
        cells = "".join(f"{step:>10.1f} {step / row['published_s'] - 1:>+6.0%} " for step in row["by_spread"].values())
        print(f"  {row['share']:<14}{row['published_s']:>10.1f} s{cells}")
    for entry in NOT_REPRODUCED:
        print(f"{entry['system']} ({entry['source']}): {entry['published']}.")
        print(f"  Not reproduced, inputs not public: {entry['missing']}.")
    return {"verl": rows, "not_reproduced": list(NOT_REPRODUCED)}


def _plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of splits, and the best of each size."""
    print(
        f"\n{'GPUs':>5}{'batch':>7}  {'split':<18}{'staleness':>10}{'step s':>9}{'samples/s':>11}{'× sync':>8}"
        f"{'engines full':>14}{'learner':>9}"
    )
    rows: list[dict[str, Any]] = []
    for num_gpus in options.gpus:
        best: Candidate | None = None
        for rollout_batch in (batch for batch in options.batches if is_sensible(num_gpus, batch)):
            tried = candidates(
                num_gpus,
                rollout_batch,
                options.staleness,
                Hardware(),
                # A large batch averages over so many completions that a few versions say the same.
                num_versions=7 if rollout_batch < 4096 else 5,
            )
            for candidate in tried:
                row = _row(candidate, tried[0])
                rows.append(row)
                print(_line(row), flush=True)
            best = max([*tried, *([best] if best else [])], key=lambda candidate: candidate.samples_per_s)
        if best is not None:
            print(
                f"{num_gpus:>5}  most: {_split_name(best)}, batch {best.rollout_batch}, staleness {best.max_staleness}: "
                f"{best.samples_per_s:.0f} samples/s"
            )
    return rows


def _row(candidate: Candidate, colocated: Candidate) -> dict[str, Any]:
    return candidate.outcome.row(candidate.schedule) | {
        "num_gpus": candidate.num_gpus,
        "rollout_batch": candidate.rollout_batch,
        "split": _split_name(candidate),
        "num_generating": candidate.num_generating,
        "max_staleness_allowed": candidate.max_staleness,
        "training_s": candidate.schedule.training_s,
        "speedup": candidate.samples_per_s / colocated.samples_per_s,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['num_gpus']:>5}{row['rollout_batch']:>7}  {row['split']:<18}{row['max_staleness_allowed']:>10}{row['step_s']:>9.1f}"
        f"{row['samples_per_s']:>11.1f}{row['speedup']:>8.2f}{row['engines_full']:>14.0%}{row['learner_busy']:>9.0%}"
    )


def _split_name(candidate: Candidate) -> str:
    rest = candidate.num_gpus - candidate.num_generating
    return f"{candidate.num_generating} + {rest}" if candidate.max_staleness else "colocated, sync"


def _parser() -> argparse.ArgumentParser:
    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(prog="python -m vtriune.plan", description=NOTICE)
    parser.add_argument("--gpus", type=numbers, default=[8, 64, 512, 4096], help="sizes of the cluster, 8 to 4096")
    parser.add_argument("--batches", type=numbers, default=[256, 1024, 4096], help="groups per version")
    parser.add_argument("--staleness", type=numbers, default=[1, 2, 4], help="off-policy bounds")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

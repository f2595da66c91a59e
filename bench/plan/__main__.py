"""What asynchrony buys before a cluster is rented: `python -m bench.plan [--gpus 8,64,512,4096] [--json FILE]`.

Three parts. The event model against the real control plane (`bench.device_time`) on a small fleet; against published figures of other
systems, where their inputs are public; then, per number of GPUs, the split between generation and training, the staleness and
the batch that give most.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from bench.device_time.run import measure
from bench.machine import describe, heading, write_json
from bench.plan.fleet import Choice, Hardware, candidates, is_sensible
from bench.plan.model import simulate
from bench.plan.published import NOT_REPRODUCED, SPREADS, verl_rows
from bench.schedule import Schedule

NOTICE = "EVENT MODEL on a virtual clock, from declared costs of a 7B model on H100s (bench/simulated_device.py, bench/plan/fleet.py)."


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = _parser().parse_args(arguments)
    head = describe()
    print(heading(head), NOTICE, sep="\n")
    result: dict[str, Any] = {"notice": NOTICE}
    if not options.skip_validation:
        result["validation"] = asyncio.run(_validate(options.clock_scale))
    if not options.skip_published:
        result["published"] = _compare()
    result["plan"] = _plan(options)
    write_json(options.json, head, result)
    return 0


async def _validate(clock_scale: float) -> list[dict[str, float | str]]:
    """The same schedules on real processes and in the model."""
    print("\nagainst the real control plane over simulated device time (bench.device_time), 8 generators:")
    base = Schedule(num_engines=8, rollout_batch=32, training_s=14.0)
    rows: list[dict[str, float | str]] = []
    for name, changes in (
        ("on_policy", {"mode": "on_policy", "max_staleness": 0, "num_versions": 4, "num_unmeasured": 1}),
        ("off_policy 2", {"num_versions": 7}),
    ):
        schedule = msgspec.structs.replace(base, **changes)
        with tempfile.TemporaryDirectory(prefix="plan-") as folder:
            real_s = (await measure(schedule, Path(folder), clock_scale=clock_scale)).outcome.step_s
        modelled_s = simulate(schedule).step_s
        print(
            f"  {name:<14}{real_s:>8.2f} s real{modelled_s:>10.2f} s modelled   difference {modelled_s / real_s - 1:+.1%}"
        )
        rows.append(
            {"schedule": name, "real_s": real_s, "modelled_s": modelled_s, "difference": modelled_s / real_s - 1}
        )
    return rows


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
        print(
            f"{entry['system']} ({entry['source']}): {entry['published']}.\n  Not reproduced, inputs not public: {entry['missing']}."
        )
    return {"verl": rows, "not_reproduced": list(NOT_REPRODUCED)}


def _plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of splits, and the best of each size."""
    print(
        f"\n{'GPUs':>5}{'batch':>7}  {'split':<18}{'staleness':>10}{'step s':>9}{'samples/s':>11}{'× sync':>8}"
        f"{'engines full':>14}{'learner':>9}"
    )
    rows: list[dict[str, Any]] = []
    for num_gpus in options.gpus:
        best: Choice | None = None
        for rollout_batch in options.batches:
            if not is_sensible(num_gpus, rollout_batch):
                continue
            choices = candidates(
                num_gpus,
                rollout_batch,
                options.staleness,
                Hardware(),
                # A large batch averages over so many completions that a few versions say the same.
                num_versions=7 if rollout_batch < 4096 else 5,
                room_factor=options.room_factor,
            )
            for choice in choices:
                row = _row(choice, choices[0])
                rows.append(row)
                print(_line(row), flush=True)
            best = max([*choices, *([best] if best else [])], key=lambda choice: choice.samples_per_s)
        if best is not None:
            print(
                f"{num_gpus:>5}  most: {_split_name(best)}, batch {best.rollout_batch}, staleness {best.max_staleness}: "
                f"{best.samples_per_s:.0f} samples/s"
            )
    return rows


def _row(choice: Choice, colocated: Choice) -> dict[str, Any]:
    return choice.outcome.row(choice.schedule) | {
        "num_gpus": choice.num_gpus,
        "rollout_batch": choice.rollout_batch,
        "split": _split_name(choice),
        "num_generating": choice.num_generating,
        "max_staleness_allowed": choice.max_staleness,
        "training_s": choice.schedule.training_s,
        "speedup": choice.samples_per_s / colocated.samples_per_s,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['num_gpus']:>5}{row['rollout_batch']:>7}  {row['split']:<18}{row['max_staleness_allowed']:>10}{row['step_s']:>9.1f}"
        f"{row['samples_per_s']:>11.1f}{row['speedup']:>8.2f}{row['engines_full']:>14.0%}{row['learner_busy']:>9.0%}"
    )


def _split_name(choice: Choice) -> str:
    if choice.is_colocated:
        return "colocated, sync"
    return f"{choice.num_generating} + {choice.num_gpus - choice.num_generating}"


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=NOTICE)
    parser.add_argument("--gpus", type=_numbers, default=[8, 64, 512, 4096], help="sizes of the cluster, 8 to 4096")
    parser.add_argument("--batches", type=_numbers, default=[256, 1024, 4096], help="groups per version")
    parser.add_argument("--staleness", type=_numbers, default=[1, 2, 4], help="off-policy bounds")
    parser.add_argument(
        "--room-factor",
        type=float,
        default=2.0,
        help="completions leased to an engine, in multiples of what it decodes at once",
    )
    parser.add_argument(
        "--skip-validation", action="store_true", help="do not run the real control plane beside the model"
    )
    parser.add_argument("--skip-published", action="store_true", help="do not model other systems' published figures")
    parser.add_argument(
        "--clock-scale", type=float, default=0.1, help="machine seconds per device second of the validation"
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""On-policy against off-policy over simulated device time: `python -m bench.device_time [--generators 32,64] [--json FILE]`.

The control plane is the product's own, in real processes over real sockets; only the accelerators' time is slept, shortened by
`--clock-scale`. So a step's time is in seconds of the modelled device, and the control plane's overhead is measured in
machine seconds and set against the step at the device's own speed, at which it would run.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from bench.device_time.run import Measured, measure
from bench.machine import describe, heading, write_json
from verifiers import terminal
from vtriune.plan.model import simulate
from vtriune.plan.schedule import Schedule
from vtriune.plan.simulated_device import Lengths

NOTICE = (
    "SIMULATED DEVICE TIME: decoding, training and weight transfer are slept from a length distribution and a declared cost model;\n"
    "controller, window, leases, ledger, sockets, verifiers and data store are real. No accelerator was measured."
)


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0 when every run ended."""
    options = _parser().parse_args(arguments)
    head = describe()
    print(heading(head), NOTICE, sep="\n")
    rows: list[dict[str, Any]] = []
    for num_generators in options.generators:
        rows += asyncio.run(_sweep(num_generators, options))
    write_json(options.json, head, {"notice": NOTICE, "clock_scale": options.clock_scale, "rows": rows})
    return 0


async def _sweep(num_generators: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """On-policy, then off-policy at each staleness, over one fleet."""
    base = Schedule(
        num_engines=num_generators,
        max_sequences=options.max_sequences,
        rollout_batch=options.batch or num_generators * options.max_sequences // 8,
        seed=options.seed,
        lengths=Lengths() if options.tokens is None else Lengths(options.tokens, sigma=0.0, cap=options.tokens),
    )
    base = msgspec.structs.replace(base, training_s=training_s(base, options.learner))
    print(
        f"\n{num_generators} generators in {options.processes} processes × {base.max_sequences} sequences; "
        f"P = {base.rollout_batch} groups of {base.group_size}; lengths log-normal, median {base.lengths.median:.0f}, "
        f"σ {base.lengths.sigma}, cap {base.lengths.cap}, mean {base.lengths.mean:.0f}\n"
        f"learner {base.training_s:.1f} s a batch ({options.learner}), publish {base.costs.publish_s} s; full engines would "
        f"generate a batch in {base.generation_s:.1f} s: optimum of overlap {base.optimal_step_s:.1f} s a step; "
        f"clock × {1 / options.clock_scale:.0f}"
    )
    print(_HEADER)
    rows: list[dict[str, Any]] = []
    for staleness in dict.fromkeys((0, *options.staleness)):
        mode = "off_policy" if staleness else "on_policy"
        schedule = msgspec.structs.replace(
            base,
            mode=mode,
            max_staleness=staleness,
            num_versions=options.versions + (4 if staleness else 0),
            num_unmeasured=2 if staleness else 1,
        )
        with tempfile.TemporaryDirectory(prefix="device-time-") as folder:
            measured = await measure(
                schedule, Path(folder), clock_scale=options.clock_scale, num_processes=options.processes
            )
        row = _row(schedule, measured, rows[0]["step_s"] if rows else None)
        rows.append(row)
        print(_line(row), flush=True)
        held = ", ".join(f"{role} {num_bytes / 2**20:.0f} MiB" for role, num_bytes in row["peak_bytes"].items())
        print(f"{'':<14}controller {row['controller_cpu_share']:.2%} of a core; at their fullest: {held}", flush=True)
    return rows


def training_s(base: Schedule, learner: str) -> float:
    """The learner's time for a batch: `drained`, the mean time that generating a batch on-policy takes (from the event model, which
    draws the same lengths); `steady`, the time full engines take for one; `between`, the mean of the two; or a number of seconds."""
    if learner == "steady":
        return base.generation_s
    if learner not in ("drained", "between"):
        return float(learner)
    on_policy = msgspec.structs.replace(base, mode="on_policy", max_staleness=0, num_versions=12)
    drained_s = simulate(on_policy).generation_s
    return drained_s if learner == "drained" else (drained_s + base.generation_s) / 2


_HEADER = (
    f"{'mode':<14}{'step s':>8}{'samples/s':>11}{'× on-policy':>13}{'of optimum':>12}{'engines busy':>14}{'learner busy':>14}"
    f"{'staleness':>13}{'overhead':>19}{'event model':>13}"
)


def _row(schedule: Schedule, measured: Measured, on_policy_s: float | None) -> dict[str, Any]:
    modelled = simulate(schedule)
    return measured.outcome.row(schedule) | {
        "mode": schedule.mode,
        "max_staleness_allowed": schedule.max_staleness,
        "num_generators": schedule.num_engines,
        "training_s": schedule.training_s,
        "speedup": None if on_policy_s is None else on_policy_s / measured.outcome.step_s,
        "overhead_s": measured.overhead.critical_s,
        "overhead_share": measured.overhead.critical_s / measured.outcome.step_s,
        "controller_cpu_s": measured.overhead.controller_cpu_s,
        "controller_cpu_share": measured.overhead.controller_cpu_s / measured.outcome.step_s,
        "modelled_step_s": modelled.step_s,
        "agreement": measured.outcome.step_s / modelled.step_s - 1,
        "peak_bytes": measured.peak_bytes,
        "num_duplicates": measured.num_duplicates,
        "ledger": measured.ledger,
    }


def _line(row: dict[str, Any]) -> str:
    name = "on_policy" if row["mode"] == "on_policy" else f"off_policy {row['max_staleness_allowed']}"
    speedup = f"{row['speedup']:.2f}" if row["speedup"] else "1"
    optimum = f"{row['of_optimum']:.1%}" if row["speedup"] else "–"
    return (
        f"{name:<14}{row['step_s']:>8.2f}{row['samples_per_s']:>11.1f}{speedup:>13}{optimum:>12}"
        f"{row['engines_busy']:>14.0%}{row['learner_busy']:>14.0%}"
        f"{row['mean_staleness']:>8.2f} ≤ {row['max_staleness']:<2}"
        f"{1000 * row['overhead_s']:>9.0f} ms {row['overhead_share']:>6.2%}{row['agreement']:>+13.1%}"
    )


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.device_time", description=NOTICE)
    parser.add_argument("--generators", type=_numbers, default=[32, 64], help="fleets to run, for example 1,8,32,64")
    parser.add_argument(
        "--staleness", type=_numbers, default=[2], help="off-policy bounds beside on-policy, for example 1,2,4"
    )
    parser.add_argument("--batch", type=int, help="groups a version; default: as many as fill the engines once")
    parser.add_argument("--tokens", type=int, help="length of every completion; default: log-normal, median 400")
    parser.add_argument("--max-sequences", type=int, default=32, help="sequences an engine decodes at once")
    parser.add_argument(
        "--learner", default="drained", help="drained (on-policy's mean generation time), steady, between, or seconds"
    )
    parser.add_argument("--versions", type=int, default=4, help="versions on-policy; off-policy runs four more")
    parser.add_argument("--clock-scale", type=float, default=0.15, help="machine seconds per device second")
    parser.add_argument("--processes", type=int, default=2, help="processes that the generators share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

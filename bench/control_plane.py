"""What the control plane takes of a core per group, stage by stage: `python -m bench.control_plane [--generators 64,256,1024]`.

Real: controller, groups, leasing, orders (over actors in process that answer at once); generator's, pool's, recorder's and learner's
ends of every message, each in a process of its own over real sockets; journal, archive, the learner's inbox. Left out: sampling,
training, and scoring itself, which `bench.verifiers` measures and which takes as many cores as it is given.

A stage must keep up on one core with 16 times the completions that `vtriune.plan` finds for a 7B model on 64 GPUs at a batch of 1,024
groups, so that 1,024 GPUs are served by one controller and one recorder. Groups are 8 completions of the plan's lengths, English.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import describe, heading, write_json
from bench.pipeline import Flow, archive_bytes_per_token, decoder_in, flow, write_model
from tests.run.stage import Stage as FakeRun
from verifiers import terminal
from vtriune.config.tree import Policy
from vtriune.messages import GroupReport
from vtriune.plan.fleet import Hardware, candidates
from vtriune.transport import codec

NUM_GPUS, ROLLOUT_BATCH, GROUP_SIZE = 64, 1024, 8
HEADROOM = 16


class Stage(NamedTuple):
    """One stage's cost."""

    name: str
    num_generators: int | None
    """None: its cost does not depend on it."""
    us_per_group: float
    bytes_per_group: float
    """That it sends, keeps or writes."""

    def headroom(self, groups_per_s: float) -> float:
        """How many times that rate one core keeps up with."""
        return 1e6 / self.us_per_group / groups_per_s


def plan_rate() -> float:
    """Groups per second of a 7B model on 64 GPUs, by the best split and staleness of the plan."""
    found = candidates(NUM_GPUS, ROLLOUT_BATCH, [1, 2, 4], Hardware())
    return max(candidate.samples_per_s for candidate in found) / GROUP_SIZE


def controller_stage(num_generators: int, num_versions: int = 2) -> Stage:
    """CPU time of a run whose other roles are fakes in this process, theirs included; 16 groups a generator and batch."""
    rollout_batch = num_generators * ROLLOUT_BATCH // NUM_GPUS
    policy = Policy(mode="off_policy", max_staleness=2, rollout_batch=rollout_batch, group_size=GROUP_SIZE)
    with tempfile.TemporaryDirectory(prefix="control-plane-") as folder:
        run = FakeRun(
            Path(folder), policy, steps=num_versions, num_rows=8 * rollout_batch, num_generators=num_generators,
            room=2 * Hardware().max_sequences,
        )  # fmt: skip
        before = time.process_time()
        asyncio.run(_to_the_end(run))
        seconds = time.process_time() - before
    sent = [_num_bytes(run.leases[-1]), _num_bytes(GroupReport(1 << 20, 0, 4096, [0.5] * GROUP_SIZE, 0, 0.01))]
    return Stage("controller", num_generators, 1e6 * seconds / len(run.leases), float(sum(sent)))


async def _to_the_end(run: FakeRun) -> None:
    controller = await run.open()
    await controller.run()


def _num_bytes(message: Any) -> int:
    return codec.pack((message,)).num_bytes


def flow_stages(measured: Flow) -> list[Stage]:
    """One stage per process of the flow."""
    return [
        Stage(name, None, 1e6 * part.cpu_s / measured.num_groups, part.num_bytes / measured.num_groups)
        for name, part in measured.parts.items()
    ]


def table(stages: list[Stage], groups_per_s: float) -> str:
    """A line per stage, and which saturates first."""
    lines = [f"{'stage':<34}{'generators':>11}{'µs/group':>10}{'bytes/group':>13}{'groups/s':>10}{'headroom':>10}"]
    for stage in stages:
        generators = stage.num_generators or "any"
        lines.append(
            f"{stage.name:<34}{generators:>11}{stage.us_per_group:>10.0f}{stage.bytes_per_group:>13,.0f}"
            f"{1e6 / stage.us_per_group:>10,.0f}{stage.headroom(groups_per_s):>9.1f}×"
        )
    first = max(stages, key=lambda stage: stage.us_per_group)
    lines.append(
        f"first to saturate a core: {first.name}{f' at {first.num_generators} generators' if first.num_generators else ''}, at "
        f"{first.headroom(groups_per_s):.1f} × the plan's {groups_per_s:.1f} groups/s (asked: {HEADROOM} ×)"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line. 1 when a stage falls short of the headroom."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.control_plane", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--generators", type=_numbers, default=[64, 256, 1024])
    parser.add_argument(
        "--groups", type=int, default=192, help="groups sent through the processes; their text repeats itself beyond 25"
    )
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; default: one trained on the text")
    parser.add_argument("--tokens", type=int, help="every completion so long; default: the plan's lengths")
    parser.add_argument("--groups-per-s", type=float, help="the rate to hold against; default: the plan's")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args(arguments)
    head = describe()
    print(heading(head))
    rate = options.groups_per_s or plan_rate()
    with tempfile.TemporaryDirectory(prefix="control-plane-") as name:
        folder = Path(name)
        write_model(folder / "flow" / "model", options.tokenizer)
        decoder = decoder_in(folder / "flow" / "model")
        sizes = {keeps: archive_bytes_per_token(folder, decoder, keeps_logprobs=keeps) for keeps in (True, False)}
        measured = asyncio.run(flow(folder / "flow", options.groups, options.tokens))
    stages = [controller_stage(count) for count in options.generators] + flow_stages(measured)
    print(table(stages, rate))
    print(f"archive: {sizes[True]:.2f} bytes a token, {sizes[False]:.2f} under record.logprobs: false")
    rows = [stage._asdict() | {"headroom": stage.headroom(rate)} for stage in stages]
    archived = {"with_logprobs": sizes[True], "without": sizes[False]}
    write_json(options.json, head, {"groups_per_s": rate, "stages": rows, "archive_bytes_per_token": archived})
    return int(any(stage.headroom(rate) < HEADROOM for stage in stages))


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

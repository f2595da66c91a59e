"""A training run over recorded trajectories that is killed again and again: run as a program by `test_kills`.

Everything that a checkpoint is about is the product's: controller, ledger, window, cursor, learner (one FSDP2 rank), recording,
snapshots, the choice of the checkpoint to resume from. Only what needs an engine is played: a generator serves recorded
completions, and a publish moves no bytes.

Every attempt is a fork of one process that has imported everything and started no thread: a start costs a fraction of a second.
"""

import asyncio
import importlib
import json
import logging
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from learner.rank import LearnerRank
from tests.learner.worlds import World, config_with, random_groups, write_model
from tests.run.stage import FakeVerifiers, Rows, mesh_of, silent
from vtriune import roles
from vtriune.config import Config
from vtriune.messages import (
    Canary,
    Example,
    Group,
    GroupReport,
    Lease,
    PublishOrder,
    PublishReport,
    Purpose,
    Rendezvous,
    SampleRef,
    ScoredGroup,
    StepRecord,
    TrainOrder,
    TrainReport,
    Trajectory,
    VersionSpan,
)
from vtriune.record import archive
from vtriune.record.recording import Recording
from vtriune.run.controller import Controller
from vtriune.run.fleet import Fleet, Spawned
from vtriune.run.folder import claim
from vtriune.run.publisher import Publisher
from vtriune.run.snapshots import Snapshots

NUM_ROWS, NUM_EPOCHS, BATCH, SIZE = 108, 2, 4, 2
STALENESS_0 = "off_policy-0"
"""Name of the run that is off-policy with a bound of 0; all others are on-policy."""
SWITCHED = "switched"
"""Name of the run of four updates a batch that becomes on-policy, one update a batch, at 0.7; its rate falls by a cosine."""
NUM_SWITCHED, SWITCHES_AT = 30, 0.7
NEVER_KILLED = ("uninterrupted", STALENESS_0, SWITCHED)
"""They write their last checkpoint only, which takes three times as long as training a version."""
NUM_VERSIONS = NUM_ROWS * NUM_EPOCHS // BATCH
CANARY = Canary(SampleRef("train", 0), np.arange(3, dtype=np.int32))

Moment = Literal["starting", "checkpoint", "anywhere"]
MOMENTS: tuple[Moment, ...] = ("starting", "checkpoint", "anywhere")


def make_world() -> tuple[World, list[ScoredGroup]]:
    """The same prompts and completions in every process; row i's recording is the i-th."""
    world = World()
    return world, random_groups(world, np.random.default_rng(7), NUM_ROWS, size=SIZE, lengths=(1, 6))


def record(folder: Path) -> None:
    """The model and the recorded trajectories that all attempts share."""
    # Few tensors: what a checkpoint of a small model costs is their number.
    write_model(folder / "model", num_layers=1)
    _, groups = make_world()
    archive.write(folder, "version", 1, (archive.Archived(0, group) for group in groups))


def config_of(folder: Path, name: str) -> Config:
    phases = [{"until": SWITCHES_AT, "mode": "off_policy", "max_staleness": 2}, {"mode": "on_policy"}]
    policies: dict[str, dict[str, Any]] = {
        STALENESS_0: {"mode": "off_policy", "max_staleness": 0},
        SWITCHED: {"mode": "off_policy", "max_staleness": 2, "update_batch": 1, "schedule": phases},
    }
    length = {"steps": NUM_SWITCHED} if name == SWITCHED else {"epochs": NUM_EPOCHS}
    return config_with(
        run={"folder": str(folder / "runs"), "name": name, "seed": 3, **length},
        model={"path": str(folder / "model")},
        data={"prompt_pool": False, "store": str(folder / "stores")},
        cluster={"learner": {"threads": 1}},
        policy={"rollout_batch": BATCH, "group_size": SIZE, **policies.get(name, {})},
        optimizer={"lr": 1e-2, "token_budget": 120, "decay": "cosine" if name == SWITCHED else "none"},
        evaluation={"before": False, "after": False},
        checkpoint={"every": 0 if name in NEVER_KILLED else 1, "keep": 2},
    )


class RecordedLearner(LearnerRank):
    """The product's learner rank over the world's prompts, behind an actor's calls: sync ones in order on a thread of their own."""

    def __init__(self, config: Config, world: World) -> None:
        super().__init__(config, [], rank=0, num_ranks=1)
        self._world = world
        self._thread = ThreadPoolExecutor(1)

    def _source(self) -> Any:
        return self._world

    def endpoints(self) -> "LearnerEndpoints":
        return LearnerEndpoints(self, self._thread)


class LearnerEndpoints:
    """What the controller calls."""

    def __init__(self, service: RecordedLearner, thread: ThreadPoolExecutor) -> None:
        self._service, self._thread = service, thread

    async def train(self, order: TrainOrder) -> TrainReport:
        return await self._in_order(self._service.train, order)

    async def save(self, folder: str) -> None:
        await self._in_order(self._service.save, folder)

    async def saved(self) -> None:
        await asyncio.to_thread(self._service.saved)

    async def load(self, folder: str) -> None:
        await self._in_order(self._service.load, folder)

    async def open_rendezvous(self, num_members: int) -> Rendezvous:
        return Rendezvous("127.0.0.1", 1, num_members, "gloo")

    async def publish(self, order: PublishOrder) -> PublishReport:
        return PublishReport(order.version, 1, 0, "nothing moves", 0.0)

    async def canary(self, canary: Canary) -> list[float]:
        return [0.0] * len(canary.response_ids)

    async def _in_order(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)


class Playback:
    """A generator that serves what was recorded for a sample, as the version it holds, after an arbitrary time."""

    def __init__(self, recorded: list[ScoredGroup], learner: RecordedLearner, recording: Recording) -> None:
        self._recorded, self._learner, self._recording = recorded, learner, recording
        self._version = -1

    async def generate(self, lease: Lease, others: list[roles.Generator]) -> GroupReport:
        version = self._version
        await asyncio.sleep(random.random() * 0.004)
        scored = self._recorded[lease.sample.row]
        trajectories = [
            Trajectory(t.token_ids, t.logprobs, [VersionSpan(version, len(t.token_ids))], "stop", "")
            for t in scored.group.trajectories
        ]
        scored = ScoredGroup(Group(lease, scored.group.prompt_ids, trajectories, 0), scored.verdicts)
        await asyncio.to_thread(self._learner.deliver, scored)
        self._recording.add(scored)
        rewards = [verdict.reward for verdict in scored.verdicts]
        return GroupReport(lease.group_id, lease.attempt, 10, rewards, 0, 0.0)

    async def receive(self, order: PublishOrder) -> PublishReport:
        self._version = order.version
        return PublishReport(order.version, 1, 0, "nothing moves", 0.0)

    async def canary(self, canary: Canary) -> list[float]:
        return [0.0] * len(canary.response_ids)

    async def stats(self) -> dict[str, float]:
        return {}


class Recorder:
    """The product's recording, written at once."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    async def record_step(self, record: StepRecord) -> dict[str, float]:
        line, ticket = self._recording.step(record)
        self._recording.write_step(ticket)
        self._recording.forget_step(ticket)
        return line

    async def example(self, purpose: Purpose) -> Example | None:
        return self._recording.examples.get(purpose)

    async def recorded(self) -> None:
        pass

    async def truncate_after(self, version: int) -> int:
        return self._recording.truncate_after(version)


class NoProcess:
    async def stop(self) -> None:
        pass


def attempt(folder: Path, name: str, is_ready: int) -> None:
    """One start of the run's command: begin, or go on from the last complete checkpoint, and train to the end.

    A byte on the descriptor `is_ready` says that training begins.
    """
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    random.seed(os.urandom(8))
    config = config_of(folder, name)
    run_folder, checkpoint, finished, notes, _ = claim(config, "continue")
    print(*notes, sep="\n", flush=True)
    if finished is not None:
        return
    world, _ = make_world()
    learner = RecordedLearner(config, world)
    learner.connect("127.0.0.1", learner.open_store())
    recording = Recording(run_folder)
    recorded = [archived.group for archived in archive.read(folder / "version-000001.parquet")]

    async def spawn(_: int) -> Spawned:
        return Spawned(NoProcess(), mesh_of(roles.Generator, Playback(recorded, learner, recording)))

    async def train() -> None:
        endpoints = mesh_of(roles.Learner, learner.endpoints())
        fleet = Fleet(1, 2 * BATCH * SIZE, 0, spawn, lambda: controller.wake())
        publisher = Publisher(endpoints, fleet, CANARY, max_canary_error=1e-6)
        snapshots = Snapshots(run_folder / "checkpoints", config.checkpoint)
        store: Any = Rows(NUM_ROWS)
        controller = Controller(
            config,
            store,
            fleet,
            publisher,
            None,
            endpoints,
            mesh_of(roles.VerifierPool, FakeVerifiers()),
            mesh_of(roles.Recorder, Recorder(recording)),
            snapshots,
            silent,
            print,
        )
        await fleet.start()
        if checkpoint is not None:
            await controller.resume(checkpoint)
        os.write(is_ready, b".")
        await controller.run()

    asyncio.run(train())
    recording.close()


class Outcome(msgspec.Struct):
    """What the killing program reports."""

    num_kills: int
    num_half_written: int
    """Kills that left a checkpoint in the middle of being written."""
    resumed_from: list[int]
    """Version from which each later attempt went on; 0: from the beginning."""
    uninterrupted_s: float
    killed_s: float


def run_killed(folder: Path, num_kills: int, rng: random.Random, version_s: float) -> tuple[int, list[int]]:
    """Kill `num_kills` attempts at the run `killed`, then let it end. Returns how many kills cut a checkpoint, and the resumes."""
    checkpoints = folder / "runs" / "killed" / "checkpoints"
    num_half_written, resumed_from = 0, []
    for number in range(num_kills):
        pid, is_ready = _start(folder, "killed")
        _wait_for(MOMENTS[number % len(MOMENTS)], is_ready, checkpoints, rng, version_s)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(is_ready)
        assert os.WIFSIGNALED(status), f"attempt {number} ended by itself with status {status}; see {folder}/killed.txt"
        num_half_written += any(checkpoints.glob(".step-*.partial"))
        resumed_from.append(_latest(checkpoints))
    _finish(folder, "killed")
    return num_half_written, resumed_from


def _wait_for(moment: Moment, is_ready: int, checkpoints: Path, rng: random.Random, version_s: float) -> None:
    if moment == "starting":
        time.sleep(rng.uniform(0, 0.4))
        return
    os.read(is_ready, 1)
    # By the run's own progress, not by the clock: however busy the machine, kills fall all along the run and never after its end.
    num_more = 0 if moment == "checkpoint" else rng.randint(0, 1)
    first = _latest(checkpoints)
    end = time.monotonic() + 120
    while _latest(checkpoints) < first + num_more and time.monotonic() < end:
        time.sleep(0.0005)
    while moment == "checkpoint" and not any(checkpoints.glob(".step-*.partial")) and time.monotonic() < end:
        time.sleep(0.0005)
    # Up to seven tenths of a version, its checkpoint included.
    time.sleep(rng.uniform(0, 2.8 * version_s))


def _latest(checkpoints: Path) -> int:
    """Version of the newest checkpoint that has its name; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")), default=0)


def _start(folder: Path, name: str) -> tuple[int, int]:
    """(pid, descriptor that yields a byte when training begins) of a fork that runs one attempt."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    output = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        attempt(folder, name, writer)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _finish(folder: Path, name: str) -> None:
    pid, is_ready = _start(folder, name)
    _, status = os.waitpid(pid, 0)
    os.close(is_ready)
    assert status == 0, f"the run {name} ended with status {status}:\n{(folder / f'{name}.txt').read_text()[-3000:]}"


def kill(folder: Path, num_kills: int, seed: int) -> None:
    """The uninterrupted run, on-policy and with a bound of 0, and the killed one, to their ends; prints the Outcome as JSON."""
    started = time.monotonic()
    _finish(folder, "uninterrupted")
    uninterrupted_s = time.monotonic() - started
    _finish(folder, STALENESS_0)
    started = time.monotonic()
    cut, resumed = run_killed(folder, num_kills, random.Random(seed), uninterrupted_s / NUM_VERSIONS)
    print(
        json.dumps(msgspec.to_builtins(Outcome(num_kills, cut, resumed, uninterrupted_s, time.monotonic() - started)))
    )


def load_everything() -> None:
    """Whatever an attempt imports, imported once: transformers loads its classes on first use."""
    from vtriune.torchvision_schemas import define_missing_schemas

    define_missing_schemas()
    for module in (
        "pyarrow.pandas_compat", "torch.distributed.checkpoint._fsspec_filesystem", "torch.utils.serialization",
        "torchdata.stateful_dataloader", "transformers.models.auto.modeling_auto",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    ):  # fmt: skip
        importlib.import_module(module)


if __name__ == "__main__":
    # FOLDER kill NUM SEED | FOLDER finish NAME…
    load_everything()
    if sys.argv[2] == "kill":
        kill(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        for each in sys.argv[3:]:
            _finish(Path(sys.argv[1]), each)

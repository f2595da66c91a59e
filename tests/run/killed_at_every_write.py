"""A recorded run that is killed before its n-th write, for every n, and resumed: run as a program by `test_kills_at_writes`.

A write is whatever changes the run's folder for good: a rename, a removal, a line, a journal's record, a flush to disk. Recorder,
journal, archive, snapshots and controller are the product's; one process forks an attempt for each n, so that a start costs
nothing. Flushes are counted and not made: what is tried are kills, not power cuts.
"""

import asyncio
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.run.recorded_stage import RecordedStage
from vtriune import whole_files
from vtriune.config.tree import Policy
from vtriune.record import journal, trackers
from vtriune.record.checkpoint import latest_complete

NUM_VERSIONS = 3


class Stage(RecordedStage):
    """Off-policy, filtered, evaluated before and after, with a checkpoint after each version."""

    def __init__(self, folder: Path) -> None:
        policy = Policy("off_policy", 1, rollout_batch=2, group_size=3, filter="zero_variance")
        super().__init__(folder, policy, steps=NUM_VERSIONS, checkpoint_every=1, evaluate_every=2, num_generators=1)


class Writes:
    """Counts writes, and kills this process before the one whose number is `last`."""

    def __init__(self, last: int) -> None:
        self.num_made = 0
        self._last = last

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if self.num_made == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.num_made += 1
            return function(*arguments, **options)

        return counted

    def watch(self) -> None:
        """From now on, in this process."""
        os.replace = self.before(os.replace)
        Path.unlink = self.before(Path.unlink)  # type: ignore[method-assign]
        journal._append = self.before(journal._append)
        trackers.MetricsFile.append = self.before(trackers.MetricsFile.append)  # type: ignore[method-assign]
        whole_files.sync = self.before(lambda path: None)


async def attempt(folder: Path) -> None:
    """One start: begin, or go on from the newest complete checkpoint, to the end."""
    stage = Stage(folder)
    controller = await stage.open()
    checkpoint = latest_complete(folder / "checkpoints")
    if checkpoint is not None:
        await controller.resume(checkpoint)
    async with asyncio.timeout(60):
        await controller.run()
    await stage.close()


def run(folder: Path, last: int) -> tuple[bool, int]:
    """Whether an attempt that is killed before write number `last` came to its end, and how many writes it made."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            writes = Writes(last)
            writes.watch()
            asyncio.run(attempt(folder))
            os.write(writer, str(writes.num_made).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    made = os.read(reader, 20)
    os.close(reader)
    assert status in (0, signal.SIGKILL), f"killed before write {last}: the attempt ended with status {status}"
    return status == 0, int(made or last)


def main(folder: Path, stride: int) -> None:
    """Kills before every `stride`-th write; folders are named by it, and a copy of each as the kill left it has `-killed` besides."""
    last, is_ended = 0, False
    while not is_ended:
        own = folder / str(last)
        own.mkdir()
        is_ended, _ = run(own, last)
        if not is_ended:
            shutil.copytree(own, folder / f"{last}-killed")
            if latest_complete(own / "checkpoints") is None:
                shutil.rmtree(own)
                own.mkdir()
            resumed, _ = run(own, -1)
            assert resumed
        last += stride
    print(json.dumps(last - stride))


if __name__ == "__main__":
    # Loaded on first use, in every attempt otherwise.
    for module in ("torchdata.stateful_dataloader", "pyarrow.pandas_compat"):
        importlib.import_module(module)
    main(Path(sys.argv[1]), int(sys.argv[2]))

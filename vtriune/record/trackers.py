"""Where a version's figures go: `metrics.jsonl` in the run folder, always; Weights & Biases, if it works. Used by the recorder."""

import contextlib
import functools
import json
import logging
import math
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from vtriune import whole_files

log = logging.getLogger(__name__)


class MetricsFile:
    """`metrics.jsonl`: one flat JSON object per version, appended whole, flushed to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, metrics: dict[str, float]) -> None:
        """Add one line. JSON knows no NaN: a value that is not finite is left out and named in `_not_finite`."""
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        dropped = sorted(metrics.keys() - finite.keys())
        line = json.dumps(finite | ({"_not_finite": dropped} if dropped else {}))
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(line.encode() + b"\n")
        whole_files.sync(self.path)
        if is_new:
            whole_files.sync(self.path.parent)

    def lines_after(self, version: int) -> bytes:
        """The lines of later versions."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        return b"".join(line for line in lines if _version_of(line) > version)

    def truncate_after(self, version: int) -> int:
        """Remove the lines of later versions, and a line that a kill left torn; returns how many went."""
        if not self.path.is_file():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _version_of(line) <= version]
        if len(kept) < len(lines):
            whole_files.write(self.path, b"".join(kept))
        return len(lines) - len(kept)


def _version_of(line: bytes) -> float:
    """The line's version; infinity for a torn one."""
    try:
        return float(json.loads(line)["version"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


NUM_WAITING = 1000
"""Versions that may wait for wandb."""
FINISH_S = 60.0
"""How long the end of a run waits for wandb to take what is left; an upload may be slow."""


class Wandb:
    """A Weights & Biases run beside `metrics.jsonl`. Whatever fails in it is logged and counted and ends nothing; it is called on a
    thread of its own, because a service that hangs would otherwise hold up the run.

    Every start is a run of its own there, of one group for the folder, drawn over `version`: a run drops every step that is not above
    the ones before, and a resume goes back.
    """

    def __init__(self, mode: Literal["offline", "online", "off"], project: str, folder: Path, config: Any) -> None:
        self.num_failures = 0
        self._run: Any = None
        self._calls: queue.Queue[tuple[str, Callable[[], object]] | None] = queue.Queue(NUM_WAITING)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if mode == "off":
            return
        with self._counting("start"):
            import wandb

            self._run = wandb.init(
                project=project,
                group=_group_of(folder),
                name=_name_of_start(folder),
                dir=str(folder),
                mode=mode,
                config=config,
                settings=wandb.Settings(console="off", silent=True, init_timeout=30, x_disable_stats=True),
            )
            self._thread.start()
            self._run.define_metric("version")
            self._run.define_metric("*", step_metric="version")

    def log(self, metrics: dict[str, float], version: int) -> None:
        """Log one version's figures."""
        if self._run is not None:
            with self._counting("log to"):
                line = {**metrics, "version": version}
                self._calls.put_nowait(("log to", functools.partial(self._run.log, line)))

    def close(self, within_s: float = FINISH_S) -> None:
        """Flush and end the run's service process. Idempotent."""
        run, self._run = self._run, None
        if run is not None:
            with self._counting("finish"):
                self._calls.put(("finish", run.finish), timeout=within_s)
                self._calls.put(None, timeout=within_s)
                self._thread.join(within_s)
                if self._thread.is_alive():
                    raise TimeoutError(f"it has not ended within {within_s:.0f} s")

    def _work(self) -> None:
        for action, call in iter(self._calls.get, None):
            with self._counting(action):
                call()

    @contextlib.contextmanager
    def _counting(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # wandb raises whatever its service, the network or a full disk raise; a run must not end for its tracker.
            self.num_failures += 1
            log.warning(
                "could not %s wandb (%s: %s); metrics.jsonl has everything", action, type(error).__name__, error
            )


def _group_of(folder: Path) -> str:
    """Of all starts in `folder`: kept in it, so that a run which begins anew in its place has another."""
    path = folder / "wandb" / "group"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole_files.write(path, f"{folder.name}-{secrets.token_hex(4)}".encode())
    return path.read_text()


def _name_of_start(folder: Path) -> str:
    num_before = sum(1 for _ in (folder / "wandb").glob("*run-*"))
    return f"{folder.name}, start {num_before + 1}" if num_before else folder.name

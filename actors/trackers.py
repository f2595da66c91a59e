"""Where a version's figures go: `metrics.jsonl` in the run folder, always; Weights & Biases, if it works. Used by the recorder."""

import json
import logging
import math
import os
import zlib
from pathlib import Path
from typing import Any, Literal

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
        with self.path.open("ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate_after(self, version: int) -> int:
        """Remove the lines of later versions, and a line that a kill left torn; returns how many went.

        The file is replaced in one rename.
        """
        if not self.path.is_file():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _version_of(line) <= version]
        if len(kept) < len(lines):
            temporary = self.path.with_name(f".{self.path.name}.partial")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(self.path)
        return len(lines) - len(kept)


def _version_of(line: bytes) -> float:
    """The line's version; infinity for a torn one."""
    try:
        return float(json.loads(line)["version"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class Wandb:
    """A Weights & Biases run beside `metrics.jsonl`. Whatever fails in it is logged and counted and ends nothing."""

    def __init__(self, mode: Literal["offline", "online", "off"], project: str, folder: Path, config: Any) -> None:
        self.num_failures = 0
        self._run: Any = None
        if mode == "off":
            return
        try:
            import wandb

            self._run = wandb.init(
                project=project,
                name=folder.name,
                # The same folder resumes the same run.
                id=f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}",
                resume="allow" if mode == "online" else None,
                dir=str(folder),
                mode=mode,
                config=config,
                settings=wandb.Settings(console="off", silent=True, init_timeout=30, x_disable_stats=True),
            )
        except Exception as error:
            # wandb raises whatever its service, the network or a full disk raise; a run must not end for its tracker.
            self._failed("start", error)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log one version's figures at `step`."""
        if self._run is None:
            return
        try:
            self._run.log(metrics, step=step)
        except Exception as error:
            # As above: counted in the metrics, never raised.
            self._failed("log to", error)

    def close(self) -> None:
        """Flush and end the run's service process. Idempotent."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish()
        except Exception as error:
            # As above.
            self._failed("finish", error)

    def _failed(self, action: str, error: Exception) -> None:
        self.num_failures += 1
        log.warning("could not %s wandb (%s: %s); metrics.jsonl has everything", action, type(error).__name__, error)

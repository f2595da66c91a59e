"""Whether the kernel killed a process for memory. Its end alone does not tell: all one sees is SIGKILL.

The kernel counts such kills, before it delivers the signal, in the memory cgroup of the process and for the whole
machine. A process counts as killed for memory when it ended by SIGKILL and the counter of its own cgroup has just
risen; a kill in another cgroup (another job, another container) is not mistaken for it. Used by the watcher.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

_SAMPLES = 64
_PF_EXITING = 0x4


class MemoryKills:
    """Samples the counters of living processes, since a rise means nothing without the count before it.

    Args:
        proc: Where the proc file system is mounted.
        cgroups: Where cgroup file systems are mounted.
    """

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._counter_of: dict[int, Path] = {}
        self._seen: dict[Path, deque[tuple[float, int]]] = {}
        self._lock = threading.Lock()

    def watch(self, pid: int) -> None:
        """Start sampling the counter of a living process."""
        with self._lock:
            self._counter_of[pid] = self._proc / "vmstat"
            self._locate(pid)
            self._read([self._counter_of[pid]])

    def forget(self, pid: int) -> None:
        """The process has ended and been judged. Harmless for one that is not watched."""
        with self._lock:
            self._counter_of.pop(pid, None)
            for counter in set(self._seen) - set(self._counter_of.values()):
                del self._seen[counter]

    def sample(self) -> None:
        """Look where every watched process is now, and at each of their counters once."""
        with self._lock:
            for pid in self._counter_of:
                self._locate(pid)
            self._read(set(self._counter_of.values()))

    def _locate(self, pid: int) -> None:
        counter = self._find(pid)
        if counter is not None:
            self._counter_of[pid] = counter

    def _read(self, counters: Iterable[Path]) -> None:
        for counter in counters:
            self._seen.setdefault(counter, deque(maxlen=_SAMPLES)).append((time.monotonic(), count(counter)))

    def has_risen(self, pid: int, within_s: float) -> bool:
        """Whether a process in the cgroup where this one was last seen has been killed for memory in the last
        `within_s`, as far as the samples reach."""
        with self._lock:
            counter = self._counter_of.get(pid)
            seen = self._seen.get(counter, ()) if counter is not None else ()
        if counter is None or not seen:
            return False
        since = time.monotonic() - within_s
        before = [number for when, number in seen if when <= since] or [seen[0][1]]
        return count(counter) > before[-1]

    def _find(self, pid: int) -> Path | None:
        """The file whose line `oom_kill N` counts for this process: `memory.events` of its cgroup (version 2),
        `memory.oom_control` (version 1), or the machine's `vmstat` where neither can be read. None for a process that
        is gone or going: the kernel takes it out of its cgroup before it shows it as dead."""
        try:
            lines = (self._proc / str(pid) / "cgroup").read_text().splitlines()
            state, *_, flags = (self._proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[:7]
            if state in "ZX" or int(flags) & _PF_EXITING:
                return None
        except OSError:
            return None
        places = []
        for line in lines:
            _, controllers, path = line.split(":", 2)
            # Inside a container the mount may begin at the container's own cgroup, whatever the path says.
            if "memory" in controllers.split(","):
                base = self._cgroups / "memory"
                places += [base / path.lstrip("/") / "memory.oom_control", base / "memory.oom_control"]
            elif not controllers:
                places += [self._cgroups / path.lstrip("/") / "memory.events", self._cgroups / "memory.events"]
        return next((place for place in places if place.is_file()), self._proc / "vmstat")


def count(counter: Path) -> int:
    """The number in the line `oom_kill N`; 0 where it cannot be read."""
    try:
        for line in counter.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        return 0
    return 0

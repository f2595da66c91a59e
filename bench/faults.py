"""A real run under random faults: `python -m bench.faults FILE --faults 30 [--seed 0] [section.key=value …]`.

Launches the file once and disturbs its generator and verifier processes at random moments spread over the whole run:

| fault  | what is done                                  | what must follow                               |
| ------ | --------------------------------------------- | ---------------------------------------------- |
| kill   | SIGKILL                                       | a new process; what it held goes to others     |
| freeze | SIGSTOP, for good                             | the same, once `cluster.heartbeat_s` has passed |
| hiccup | SIGSTOP, and SIGCONT after a third of that    | nothing, or at worst the same                  |

The run has to end by itself with exit code 0. Then its books are checked: every group that was admitted has ended once or is
still open, and the archive holds every consumed group once, with all its completions. Prints faults, books and held-out
rewards before and after; ends with 1 when the run failed or a book is wrong.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from bench.machine import describe, heading, write_json
from verifiers import terminal
from vtriune.config import Config, ConfigError, load
from vtriune.record import archive
from vtriune.record.checkpoint import latest_complete
from vtriune.run.snapshots import STATE_FILE, RunState

KINDS, ROLES = ("kill", "freeze", "hiccup"), ("generator", "verifiers")


class Fault(NamedTuple):
    """One disturbance, due when `due_at` of the run's versions are done."""

    due_at: float
    kind: str
    role: str


def draw(num_faults: int, num_versions: int, seed: int) -> list[Fault]:
    """Random faults between the first version and the last but one, in order of their time."""
    chance = random.Random(seed)
    last = max(num_versions - 1.5, 1.0)
    times = sorted(chance.uniform(1.0, last) for _ in range(num_faults))
    return [Fault(due_at, chance.choice(KINDS), chance.choice(ROLES)) for due_at in times]


class Saboteur:
    """Strikes the processes of one run as its versions go by."""

    def __init__(self, run: subprocess.Popen[bytes], metrics: Path, faults: list[Fault], heartbeat_s: float) -> None:
        self.done: Counter[str] = Counter()
        self._run, self._metrics = run, metrics
        self._chance = random.Random(len(faults))
        self._faults = faults
        self._heartbeat_s = heartbeat_s
        self._frozen: list[tuple[float, psutil.Process]] = []
        self._version, self._since = 0, time.monotonic()
        self._version_s = 1.0

    def follow(self) -> int:
        """Strike until the run ends; its exit code. Waits for the clock, ten times a second."""
        while self._run.poll() is None:
            self._thaw()
            if self._faults and self._progress() >= self._faults[0].due_at and self._strike(self._faults[0]):
                self._faults.pop(0)
            time.sleep(0.1)
        return self._run.returncode

    @property
    def num_left(self) -> int:
        """Faults that found no process to strike."""
        return len(self._faults)

    def _progress(self) -> float:
        """Versions done, with the fraction that the time since the last one suggests."""
        num_lines = len(self._metrics.read_bytes().splitlines()) if self._metrics.is_file() else 0
        now = time.monotonic()
        if num_lines > self._version:
            self._version_s = (now - self._since) / (num_lines - self._version)
            self._version, self._since = num_lines, now
        return self._version + min((now - self._since) / self._version_s, 0.99)

    def _strike(self, fault: Fault) -> bool:
        """False when no process of that role is there just now; it is tried again."""
        stopped = {process.pid for _, process in self._frozen}
        victims = [p for p in _processes(self._run.pid, fault.role) if p.pid not in stopped]
        if not victims:
            return False
        victim = self._chance.choice(victims)
        victim.send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        if fault.kind == "hiccup":
            self._frozen.append((time.monotonic() + self._heartbeat_s / 3, victim))
        self.done[f"{fault.kind} {fault.role}"] += 1
        print(f"version {self._progress():6.2f}: {fault.kind} {fault.role} (pid {victim.pid})", flush=True)
        return True

    def _thaw(self) -> None:
        now = time.monotonic()
        for due, process in self._frozen:
            if due <= now and process.is_running():
                process.send_signal(signal.SIGCONT)
        self._frozen = [(due, process) for due, process in self._frozen if due > now]


def _processes(launcher: int, role: str) -> list[psutil.Process]:
    """Processes of that role that run: not ended, not stopped."""
    found = []
    try:
        children = psutil.Process(launcher).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            is_alive = child.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
            # One that ends between the two looks has an empty command line.
            if is_alive and "".join(child.cmdline()[:1]).startswith(f"vtriune {role}"):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def audit(run_folder: Path, group_size: int) -> tuple[dict[str, int], list[str]]:
    """The run's books at its end, and what is wrong with them."""
    checkpoint = latest_complete(run_folder / "checkpoints")
    if checkpoint is None:
        return {}, ["the run left no complete checkpoint"]
    ledger = msgspec.json.decode((checkpoint / STATE_FILE).read_bytes(), type=RunState).ledger
    ends: Counter[str] = Counter()
    for counts in ledger.ended.values():
        ends.update(counts)
    sizes: Counter[int] = Counter()
    for _, path in archive.files(run_folder / "rollouts", "version"):
        for archived in archive.read(path):
            sizes[archived.group.group.lease.group_id] += len(archived.group.group.trajectories)
    books = {
        "admitted": ledger.next_id,
        **{end: ends[end] for end in ("consumed", "filtered", "faulted", "lost")},
        "open": len(ledger.open_groups),
        "archived": len(sizes),
        "reissues": ledger.num_reissues,
        "duplicates": ledger.num_duplicates,
    }
    wrong = []
    if books["admitted"] != sum(books[end] for end in ("consumed", "filtered", "faulted", "lost", "open")):
        wrong.append("groups are missing: admitted is not consumed + filtered + lost + open")
    if books["archived"] != books["consumed"]:
        wrong.append(f"{books['consumed']} groups were consumed, {books['archived']} are in the archive")
    wrong += [
        f"group {group}: {size} completions archived, not {group_size}"
        for group, size in sizes.items()
        if size != group_size
    ]
    return books, wrong


def sabotaged(config: Config, arguments: list[str], num_faults: int, seed: int) -> tuple[int, Saboteur]:
    """Launch the run and follow it to its end under `num_faults` faults."""
    if config.run.steps is None:
        raise ConfigError("run.steps: faults are spread over a number of versions; set it instead of run.epochs")
    run_folder = Path(config.run.folder) / config.run.name
    if run_folder.exists():
        raise ConfigError(f"{run_folder}: exists; name another run.name or run.folder")
    budget = [f"cluster.{role}.restarts={num_faults}" for role in ("generators", "verifiers")]
    run = subprocess.Popen([sys.executable, "-m", "vtriune.launch", *arguments, *budget], stdout=subprocess.DEVNULL)
    try:
        faults = draw(num_faults, config.run.steps, seed)
        saboteur = Saboteur(run, run_folder / "metrics.jsonl", faults, config.cluster.heartbeat_s)
        return saboteur.follow(), saboteur
    finally:
        run.kill()
        run.wait()


def main(arguments: list[str] | None = None) -> int:
    """The command line. 0: the run ended by itself and its books are right; 1: not; 2: cannot be run as asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description="A real run under random faults.")
    parser.add_argument("file", type=Path, help="the run's YAML file, for example examples/digits.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args(arguments)
    head = describe()
    print(heading(head))
    try:
        config = load(options.file, options.overrides)
        code, saboteur = sabotaged(config, [str(options.file), *options.overrides], options.faults, options.seed)
    except ConfigError as error:
        print(f"cannot run:\n{error}", file=sys.stderr)
        return 2
    run_folder = Path(config.run.folder) / config.run.name
    books, wrong = audit(run_folder, config.policy.group_size)
    if code or saboteur.num_left:
        wrong.append(f"exit code {code}, {saboteur.num_left} faults not done; see {run_folder / 'logs'}")
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [(int(line["version"]), line["eval/reward/mean"]) for line in lines if "eval/reward/mean" in line]
    result: dict[str, Any] = {"faults": dict(saboteur.done), "books": books, "eval": rewards, "wrong": wrong}
    for name, value in result.items():
        print(f"{name}: {value}")
    write_json(options.json, head, result)
    return 1 if wrong else 0


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

"""The head of every benchmark's output: machine, date, command; and its result as a JSON file."""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """Machine, date and command line of this process."""
    model = platform.processor()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB",
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"{program} {shlex.join(sys.argv[1:])}".strip(),
    }


def heading(head: dict[str, Any]) -> str:
    """`describe()` as the first lines of the output."""
    load = " ".join(f"{value:.2f}" for value in head["load"])
    return f"{head['command']}\n{head['machine']}, Python {head['python']}, load {load}, {head['date']}"


def write_json(path: Path | None, head: dict[str, Any], result: dict[str, Any]) -> None:
    """The head and the result as one JSON object; nothing when `path` is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head | result, indent=1) + "\n")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

"""`python -m vtriune.data COMMAND …`: what can be done with data before a run. `COMMAND --help` says how."""

import importlib
import sys
from collections.abc import Sequence

from verifiers import terminal
from vtriune.config import ConfigError
from vtriune.data.schema import DataError

COMMANDS = {"check": "vtriune.data.check", "convert": "vtriune.data.convert.command"}
"""Name → module, whose `main` takes the words behind the name and returns the exit code, and whose docstring says what it does."""


def main(words: Sequence[str] | None = None) -> int:
    """The command line. 2: the data, or the run's file, cannot be read."""
    words = sys.argv[1:] if words is None else words
    if not words or words[0] not in COMMANDS:
        print("usage: python -m vtriune.data COMMAND …", file=sys.stderr)
        for name, module in COMMANDS.items():
            about = (importlib.import_module(module).__doc__ or "").partition("\n")[0]
            print(f"  {name:8} {about}", file=sys.stderr)
        return 0 if list(words) in (["--help"], ["-h"]) else 2
    try:
        code: int = importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    except (ConfigError, DataError) as error:
        print(f"{error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    terminal.open_output()
    sys.exit(main())

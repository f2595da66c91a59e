"""The program of the pool's processes: `python -m verifiers.worker FD PID`, started by `verifiers.pool.fork_server` only."""

import sys

from verifiers.pool.worker import main

if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))

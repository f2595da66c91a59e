"""A file that is whole or not there. Used by `verifiers.rescore`; the library stands alone, so it has this rule of its own."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write the file that takes its place at `path` once the block ends without an error; on disk then.

    After an error the place is as it was, with nothing aside. A block that writes no file replaces none.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        if partial.exists():
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

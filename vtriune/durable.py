"""What has to be on disk before something else may rely on it. Used by checkpoints, the archive and exports."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Return once the file, or the entries of the folder, at `path` are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

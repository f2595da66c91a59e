"""Files at an address (`s3://bucket/train/*.parquet`, `hf://datasets/me/mine/data`, `https://…/rows.jsonl`): copied once, then read as
files. Called by `inputs`.

    ~/.cache/vtriune/<hash of address and state>/train/rows.parquet     XDG_CACHE_HOME in place of ~/.cache where it is set

The state is what the store tells of a file without sending it (size, time, ETag): a changed one is copied anew. The last two names of
the address stay, since they may say split, task and repeats.
"""

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from vtriune import whole_files
from vtriune.data.readers import SUFFIXES
from vtriune.data.schema import DataError


def is_address(name: str) -> bool:
    """Whether `name` has a protocol."""
    return "://" in name


def fetched(key: str, address: str) -> list[Path]:
    """The copies of the files that `address`, a folder's address or a pattern stands for, sorted by address.

    Raises DataError where nothing is there, it cannot be read, or the protocol needs a package that is not installed.
    """
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(address)
        found = _found(files, path)
        if not found:
            raise DataError(f"{key}: {address} matches no file of {', '.join(SUFFIXES)}")
        return [_copied(files, each) for each in found]
    except ImportError as error:
        raise DataError(f"{key}: {address}: {error}") from error
    except DataError:
        raise
    # Each protocol has errors of its own.
    except Exception as error:
        raise DataError(f"{key}: {address} cannot be read ({type(error).__name__}: {error})") from error


def _found(files: Any, path: str) -> list[str]:
    if any(each in path for each in "*?["):
        return sorted(map(str, files.glob(path)))
    if files.isdir(path):
        return sorted(each for each in map(str, files.find(path)) if PurePosixPath(each).suffix in SUFFIXES)
    return [path] if files.exists(path) else []


def _copied(files: Any, path: str) -> Path:
    state = f"{files.protocol} {path} {files.checksum(path)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vtriune"
    target = cache.joinpath(hashlib.sha256(state.encode()).hexdigest()[:24], *PurePosixPath(path).parts[-2:])
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_files.replacing(target, is_shared=True) as partial:
            files.get_file(path, str(partial))
    return target

"""Checkpoint folders that are whole or not there: write aside, fsync, manifest with hashes, rename.

    checkpoints/.step-12.partial/   being written, by any number of processes
    checkpoints/step-12/            whole: manifest.json lists every other file with size and sha256

The controller calls `stage`, has every process write below the staging folder, then `commit` and `prune`. A run that starts asks
`latest_complete`, which checks every byte. The rename is the only moment at which a checkpoint comes to exist, and the
manifest is hashed from the files as read back, so a crash at any instruction leaves the earlier checkpoints as they were.
Torch-free: what lies in the folder is up to its writers.
"""

import hashlib
import logging
import re
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from vtriune import whole_files
from vtriune.runtime import report_step

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_STEP = re.compile(r"step-\d+")
_STAGING = re.compile(r"\.step-(\d+)(?:\.removed)?\.partial")
_HASH_THREADS = 4
"""hashlib releases the GIL: files of one checkpoint are hashed side by side."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read: names the folder, the file and what is wrong."""


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a checkpoint, by its path below the folder."""

    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """Every file of a checkpoint but the manifest itself."""

    format: int
    step: int
    files: dict[str, FileEntry]
    seal: str
    """sha256 over the three above: a damaged manifest accuses itself, not the files"""

    def sealed(self) -> str:
        """What `seal` must be."""
        return hashlib.sha256(msgspec.json.encode((self.format, self.step, sorted(self.files.items())))).hexdigest()


def stage(folder: str | Path, step: int) -> Path:
    """An empty staging folder for checkpoint `step` below `folder`; what an interrupted attempt left there is removed."""
    staging = whole_files.aside(Path(folder) / f"step-{step}")
    whole_files.remove(staging)
    staging.mkdir(parents=True)
    return staging


def commit(staging: str | Path) -> Path:
    """Seal the staging folder and give it its name; returns the checkpoint's path.

    After this returns the checkpoint survives a power cut. A checkpoint of the same step (one refused at a resume, say) is replaced;
    between its removal and the new one's appearance the one before is the latest. Raises CheckpointError for a folder that `stage`
    did not make, that holds nothing, or that holds a link.
    """
    staging = Path(staging)
    named = _STAGING.fullmatch(staging.name)
    if named is None or not staging.is_dir():
        raise CheckpointError(f"{staging}: no staging folder; take one from checkpoint.stage")
    step = int(named[1])
    files = sorted(path for path in _files_below(staging) if path != staging / MANIFEST)
    links = [str(path) for path in files if path.is_symlink()]
    if links:
        raise CheckpointError(f"{', '.join(links)}: links; a checkpoint must hold its own files")
    if not files:
        raise CheckpointError(f"{staging}: nothing was written; a checkpoint must hold at least one file")
    with ThreadPoolExecutor(max_workers=_HASH_THREADS) as threads:
        entries = threads.map(_sealed, files)
        listed = {path.relative_to(staging).as_posix(): entry for path, entry in zip(files, entries, strict=True)}
    content = Manifest(_FORMAT, step, listed, "")
    content = msgspec.structs.replace(content, seal=content.sealed())
    (staging / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(content)))
    final = staging.with_name(f"step-{step}")
    replaced = whole_files.set_aside(final) if final.exists() else None
    whole_files.install(staging, final)
    if replaced is not None:
        whole_files.remove(replaced)
    return final


def problems(checkpoint: str | Path) -> list[str]:
    """What keeps `checkpoint` from being used, each naming the file; empty for a whole one. Reads every byte."""
    checkpoint = Path(checkpoint)
    try:
        manifest = msgspec.json.decode((checkpoint / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return [f"{checkpoint / MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{checkpoint / MANIFEST} is damaged ({error})"]
    if manifest.seal != manifest.sealed():
        return [f"{checkpoint / MANIFEST} differs from its seal"]
    if manifest.format != _FORMAT or f"step-{manifest.step}" != checkpoint.name:
        return [f"{checkpoint / MANIFEST} is of format {manifest.format} and step {manifest.step}"]
    there = {path.relative_to(checkpoint).as_posix() for path in _files_below(checkpoint)}
    found = [f"{checkpoint / name} is not in the manifest" for name in sorted(there - {MANIFEST, *manifest.files})]
    with ThreadPoolExecutor(max_workers=_HASH_THREADS) as threads:
        paths = [checkpoint / name for name in manifest.files]
        found += [problem for problem in threads.map(_problem, paths, manifest.files.values()) if problem is not None]
    return found


def all_steps(folder: str | Path) -> list[Path]:
    """Checkpoint folders below `folder`, oldest first, whole or not; staging folders are none."""
    named = (path for path in Path(folder).glob("step-*") if path.is_dir() and _STEP.fullmatch(path.name))
    return sorted(named, key=step_of)


def latest_complete(folder: str | Path) -> Path | None:
    """The newest checkpoint whose every file is as its manifest says, or None. Damaged ones are named in the log."""
    found, damaged = newest_whole(folder)
    for checkpoint, reasons in damaged.items():
        log.error("checkpoint %s is refused: %s", checkpoint, "; ".join(reasons[:5]))
    return found


def newest_whole(folder: str | Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint whose every file is as its manifest says, or None; and what is wrong with each one above it."""
    damaged: dict[Path, list[str]] = {}
    for checkpoint in reversed(all_steps(folder)):
        damaged[checkpoint] = problems(checkpoint)
        if not damaged[checkpoint]:
            del damaged[checkpoint]
            return checkpoint, damaged
    return None, damaged


def prune(folder: str | Path, keep: int, whole: Container[Path] = ()) -> list[Path]:
    """Remove what is older than the newest `keep` whole checkpoints, and what interrupted writers left; returns what was removed.

    A damaged one does not count as kept, whatever its number, so that the newest whole one always stays. Those in `whole` are known to
    be; of the others every byte is read. None is ever seen half removed.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
    steps, num_kept = all_steps(folder), 0
    oldest = len(steps)
    while oldest and num_kept < keep:
        oldest -= 1
        num_kept += steps[oldest] in whole or not problems(steps[oldest])
    for checkpoint in steps[:oldest]:
        whole_files.remove(whole_files.set_aside(checkpoint))
    newest = step_of(steps[-1]) if steps else -1
    for path in Path(folder).glob(".step-*.partial"):
        # A staging folder of a later step is someone's work in hand.
        named = _STAGING.fullmatch(path.name)
        if named is not None and int(named[1]) <= newest:
            whole_files.remove(path)
    return steps[:oldest]


def step_of(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def _files_below(folder: Path) -> Iterator[Path]:
    """Everything that is no folder, links included."""
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _sealed(path: Path) -> FileEntry:
    whole_files.sync(path)  # The disk writes while others are hashed.
    return FileEntry(path.stat().st_size, _digest(path))


def _problem(path: Path, entry: FileEntry) -> str | None:
    try:
        if path.is_symlink():
            return f"{path} is a link"
        num_bytes = path.stat().st_size
        if num_bytes != entry.num_bytes:
            return f"{path} has {num_bytes} bytes where the manifest says {entry.num_bytes}"
        return None if _digest(path) == entry.sha256 else f"{path} differs from its hash in the manifest"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _digest(path: Path) -> str:
    report_step("checkpoint", f"hashes {path}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

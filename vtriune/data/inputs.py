"""Which files a run reads: those that `data.train` and `data.test` name, each with what is said of it. Called by the command lines."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vtriune.config.sections.data import Files
from vtriune.data.adapters import Said
from vtriune.data.build import Input
from vtriune.data.readers import SUFFIXES, is_saved
from vtriune.data.remote import fetched, is_address
from vtriune.data.schema import DataError


def data_files(key: str, entries: Sequence[str | Files]) -> list[Input]:
    """The file of that very name, a folder's files, or every pattern's files, sorted; each with what its entry says of it.

    DataError for one that matches nothing, and for a file that comes twice, whose rows would."""
    given = [Files(files=[entry]) if isinstance(entry, str) else entry for entry in entries]
    inputs = [each for entry in given for each in _inputs(key, entry)]
    if twice := [file for file, count in Counter(each.path.resolve() for each in inputs).items() if count > 1]:
        raise DataError(f"{key}: named twice, and so would be all rows: {', '.join(map(str, twice))}")
    return inputs


def _inputs(key: str, entry: Files) -> list[Input]:
    parm = entry.verifier_parm
    if entry.frame is not None:
        parm = {**(parm or {}), "gold_frame": entry.frame}
    said = Said(entry.source, entry.verifier, parm, entry.repeats)
    return [Input(path, said) for pattern in entry.files for path in _matches(key, pattern)]


def _matches(key: str, pattern: str) -> list[Path]:
    if is_address(pattern):
        return fetched(key, pattern)
    path = Path(pattern)
    if path.is_file() or is_saved(path):
        return [path]
    if path.is_dir():
        found = [each for each in sorted(path.rglob("*")) if each.suffix in SUFFIXES and each.is_file()]
        if not found:
            raise DataError(f"{key}: {pattern} is a folder without a file of {', '.join(SUFFIXES)}")
        # Beside files of rows, a .json says something about them.
        return [each for each in found if each.suffix != ".json"] or found
    found = [each for each in map(Path, sorted(glob.glob(pattern, recursive=True))) if each.is_file() or is_saved(each)]
    if not found:
        raise DataError(f"{key}: {pattern} matches no file")
    return found

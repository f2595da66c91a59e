"""Only one module of the product, and one of the library that stands alone, write aside, flush and rename."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.test_imports import PRODUCT, ROOT, files

OWNERS = {"vtriune/whole_files.py", "verifiers/whole_files.py"}
EXCEPTIONS = {"vtriune/run/folder.py": "an earlier run's folder takes another name; nothing is written"}
OF_OS = {"fsync", "fdatasync", "rename", "renames", "replace"}


def renames_and_flushes(path: Path) -> Iterator[str]:
    """Calls of os.replace, os.fsync and the like, of shutil.move, and of Path.rename or Path.replace: one argument, no keyword."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        is_of_path = name in ("rename", "replace") and len(node.args) == 1 and not node.keywords
        if (owner == "os" and name in OF_OS) or (owner == "shutil" and name == "move") or is_of_path:
            yield f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"


def test_no_other_module_renames_files_or_flushes_them() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): list(renames_and_flushes(path))
        for package in PRODUCT
        for path in files(package)
    }
    assert {path: calls for path, calls in found.items() if calls and path not in OWNERS | EXCEPTIONS.keys()} == {}
    assert all(found[path] for path in OWNERS | EXCEPTIONS.keys())

"""Who may import whom, and what must stay light. The rules stand in docs/architecture.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"vtriune", "actors", "learner", "verifiers", "bench", "tests", "examples"}
MAY_IMPORT = {
    "verifiers": {"verifiers"},
    "vtriune": {"vtriune", "verifiers"},
    "actors": {"actors", "vtriune", "verifiers"},
    "learner": {"learner", "vtriune", "verifiers"},
}
LAUNCH = ROOT / "vtriune" / "launch.py"
LIGHT = ["vtriune.config", "vtriune.messages", "vtriune.transport", "vtriune.runtime", "verifiers"]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    assert files(package)
    for path in files(package):
        allowed = MAY_IMPORT[package] | ({"actors", "learner"} if path == LAUNCH else set())
        used = {module.split(".")[0] for module in imports(path)} & OURS
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {used - allowed}"


def test_only_the_engine_imports_vllm() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in MAY_IMPORT
        for path in files(package)
        if any(module.split(".")[0] == "vllm" for module in imports(path))
    }
    assert users
    assert all(path == "actors/engine.py" or path.startswith("actors/engine/") for path in users), users


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_without_torch(module: str) -> None:
    probe = f"import sys, {module}; print([name for name in ('torch', 'transformers', 'vllm', 'ray', 'numba') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


FORBIDDEN_NEAR_SOCKETS = ("pickle", "cloudpickle", "dill", "marshal", "shelve")


def test_nothing_near_a_socket_can_unpickle_or_evaluate() -> None:
    for folder in ("vtriune/transport", "vtriune/runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            used = {module.split(".")[0] for module in imports(path)}
            assert not used & set(FORBIDDEN_NEAR_SOCKETS), path
            calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            names = {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}
            assert not names & {"eval", "exec", "recv_pyobj", "send_pyobj"}, path
    for package in MAY_IMPORT:
        for path in files(package):
            used = {module.split(".")[0] for module in imports(path)}
            assert "zmq" not in used or not used & set(FORBIDDEN_NEAR_SOCKETS), path

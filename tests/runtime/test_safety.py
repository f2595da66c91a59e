"""Properties of the runtime's code as a whole."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from vtriune.runtime import Actor, endpoint

ROOT = Path(__file__).parents[2]
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "recv_pyobj", "send_pyobj", "eval", "exec", "loads"}


def test_nothing_in_transport_or_runtime_can_execute_what_a_socket_brings() -> None:
    for path in [*(ROOT / "vtriune/transport").glob("*.py"), *(ROOT / "vtriune/runtime").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Name):
                names = [node.id]
            elif isinstance(node, ast.Attribute):
                names = [node.attr]
            assert not FORBIDDEN & set(names), f"{path}:{getattr(node, 'lineno', 0)}: {names}"


def cpu_s(code: str) -> tuple[float, str]:
    """Processor time that a fresh interpreter takes for `code`, and what it prints. Wall time would measure what else
    the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, printed.strip()


def test_importing_the_runtime_brings_in_nothing_heavy_and_is_quick() -> None:
    code = "import sys, vtriune.runtime; print(*(m for m in ('torch', 'numpy', 'ray', 'vllm') if m in sys.modules))"
    took = [cpu_s(code) for _ in range(3)]
    assert {heavy for _, heavy in took} == {""}
    bare_s = min(cpu_s("pass")[0] for _ in range(3))
    assert min(seconds for seconds, _ in took) - bare_s < 0.3


def test_endpoints_without_a_wire_schema_are_refused_when_declared() -> None:
    with pytest.raises(TypeError, match="annotate parameter 'x'"):

        class Unannotated(Actor):
            @endpoint
            async def f(self, x) -> int:  # type: ignore[no-untyped-def]
                return 1

    with pytest.raises(TypeError, match="needs a return annotation"):

        class NoResult(Actor):
            @endpoint
            async def f(self, x: int):  # type: ignore[no-untyped-def]
                return 1

    with pytest.raises(TypeError, match="has no wire schema"):

        class Variadic(Actor):
            @endpoint
            async def f(self, *x: int) -> int:
                return 1

    with pytest.raises(TypeError, match="names of the mesh"):

        class Clash(Actor):
            @endpoint
            async def stop(self) -> None:  # type: ignore[override]
                return None

    with pytest.raises(TypeError, match=r"\['to_ref'\] are names of the mesh"):

        class HiddenClash(Actor):
            @endpoint
            async def to_ref(self) -> None:
                return None

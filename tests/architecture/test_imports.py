"""What no import may do: close a circle, make light modules heavy, bring pickle near a socket. Which room may import which is in
`test_rooms`; the rules stand in docs/architecture.md."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = ("vtriune", "actors", "learner", "verifiers")
LIGHT = ["vtriune.config", "vtriune.messages", "vtriune.transport", "vtriune.runtime", "verifiers"]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports: at the top, inside functions, for types only. `from room import module` names the module."""
    return imported_by(path.read_text(), path.relative_to(ROOT).parent.parts)


def imported_by(source: str, package: tuple[str, ...]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_only_the_engine_imports_vllm() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in PRODUCT
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


def test_ledger_and_window_are_changed_by_groups_alone_but_for_an_evaluations_own_ledger() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for package in PRODUCT
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if (
            isinstance(node, ast.ImportFrom)
            and {alias.name for alias in node.names} & {"Ledger", "Window", "ledger", "window"}
        )
        or (
            isinstance(node, ast.Import)
            and {alias.name for alias in node.names} & {"vtriune.run.ledger", "vtriune.run.window"}
        )
    }
    assert users == {"vtriune/run/groups.py", "vtriune/plan/published.py", "vtriune/run/evaluation.py"}


FORBIDDEN_NEAR_SOCKETS = ("pickle", "cloudpickle", "dill", "marshal", "shelve")


def test_nothing_near_a_socket_can_unpickle_or_evaluate() -> None:
    for folder in ("vtriune/transport", "vtriune/runtime"):
        for path in (ROOT / folder).rglob("*.py"):
            used = {module.split(".")[0] for module in imports(path)}
            assert not used & set(FORBIDDEN_NEAR_SOCKETS), path
            assert not called(path) & {"eval", "exec", "recv_pyobj", "send_pyobj"}, path
    for package in PRODUCT:
        for path in files(package):
            used = {module.split(".")[0] for module in imports(path)}
            assert "zmq" not in used or not used & set(FORBIDDEN_NEAR_SOCKETS), path


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Every module of the product, and which others it imports. That Python loads a module's parents first does not count."""
    paths = {module_name(path): path for package in PRODUCT for path in files(package)}
    return {name: (set(imports(path)) & set(paths)) - {name} for name, path in paths.items()}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports, over any number of steps, every other of its group."""
    reach = {module: reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted({m for m in reach[module] if module in reach[m]})) for module in graph if module in reach[module]
    }
    return sorted(list(group) for group in groups)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = [start]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


def test_lazy_relative_and_type_only_imports_count_and_a_module_imported_from_its_room_is_the_module() -> None:
    source = """
import json
from vtriune.runtime import node, Actor
from . import codec
from .wire import Call
if TYPE_CHECKING:
    from vtriune.config.tree import Config
def lazily():
    import learner.losses
    from vtriune import messages
"""
    assert set(imported_by(source, ("vtriune", "transport"))) == {
        "json",
        "vtriune.runtime.node",
        "vtriune.runtime",
        "vtriune.transport.codec",
        "vtriune.transport.wire",
        "vtriune.config.tree",
        "learner.losses",
        "vtriune.messages",
    }


def test_circles_are_told_apart_from_what_merely_leads_to_them() -> None:
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert circles(graph) == [["a", "b", "c"], ["d", "e"]]


def test_no_modules_of_the_product_import_each_other_in_a_circle() -> None:
    graph = import_graph()
    assert graph["vtriune.runtime.processes.worker"], (
        "the graph holds no imports: the assertion below would hold of anything"
    )
    assert circles(graph) == []


def test_the_runtime_knows_its_own_facade_from_outside_only() -> None:
    inside = {module: used for module, used in import_graph().items() if module.startswith("vtriune.runtime.")}
    assert inside
    assert not [module for module, used in inside.items() if "vtriune.runtime" in used]


@pytest.mark.parametrize("first", ["vtriune.runtime.signature", "vtriune.runtime.invocation", "vtriune.transport.wire"])
def test_an_actors_class_stands_for_a_reference_whichever_module_is_loaded_first(first: str) -> None:
    probe = f"""
import {first}
from vtriune.runtime import Actor, ActorMesh, signature
class Told(Actor):
    def tell(self, other: "Told", others: "list[Told] | None") -> "None": ...
print(signature.Signature(Told.tell).arguments(2, ()).type)
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    mesh = "vtriune.runtime.mesh.ActorMesh[__main__.Told]"
    assert done.stdout.strip() == f"tuple[{mesh}, typing.Optional[list[{mesh}]]]"


def test_no_decision_is_taken_on_the_name_of_an_errors_class() -> None:
    """`ActorError.type_name` is for people: what an error costs is its `kind`."""
    readers = {
        path.relative_to(ROOT).as_posix()
        for package in PRODUCT
        for path in files(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "type_name"
    }
    assert readers == {"vtriune/runtime/failure.py", "vtriune/runtime/hosting.py"}


def called(path: Path) -> set[str]:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}


MAY_START_PROCESSES = {
    "vtriune/runtime/processes/local_process.py": "the run's processes",
    "vtriune/transport/folder.py": "a shell that removes the socket folder",
    "verifiers/pool/fork_server.py": "the pool's workers, in a library that stands alone",
}


def test_children_are_started_and_watched_in_one_place_of_the_kernel_and_one_of_the_library() -> None:
    starters = {
        path.relative_to(ROOT).as_posix()
        for package in PRODUCT
        for path in files(package)
        if {"subprocess", "multiprocessing"} & {module.split(".")[0] for module in imports(path)}
    }
    assert starters == MAY_START_PROCESSES.keys()

"""The shape of the code: sizes, names, types, and that every shipped example can be run."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtriune.config import check, load

ROOT = Path(__file__).parents[2]
PRODUCT = ("vtriune", "actors", "learner", "verifiers")
EMPTY_NAMES = {"utils", "util", "common", "helpers", "misc", "manager"}


def product_files() -> list[Path]:
    return sorted(path for package in PRODUCT for path in (ROOT / package).rglob("*.py"))


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_no_file_is_over_400_lines_and_nine_in_ten_are_under_300() -> None:
    sizes = {path: path.read_text().count("\n") + 1 for path in product_files()}
    assert not {str(path): size for path, size in sizes.items() if size > 400}
    assert statistics.quantiles(sizes.values(), n=10)[-1] < 340
    assert statistics.median(sizes.values()) <= 200


def test_no_function_is_over_80_lines_and_nine_in_ten_are_under_40() -> None:
    sizes = {
        f"{path}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1 for path, node in functions()
    }
    assert not {name: size for name, size in sizes.items() if size > 80}
    assert statistics.quantiles(sizes.values(), n=10)[-1] < 40


def test_every_public_function_is_typed() -> None:
    for path, node in functions():
        if node.name.startswith("_"):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not untyped, f"{path}:{node.lineno} {node.name}: {untyped}"
        assert node.returns is not None, f"{path}:{node.lineno} {node.name}"


def test_nothing_asks_for_input_and_every_process_that_is_started_gets_an_input_of_its_own() -> None:
    """A run has nobody to answer; and in the background a terminal stops whoever reads from it."""
    for path in product_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call | ast.Attribute):
                continue
            called = ast.unparse(node.func if isinstance(node, ast.Call) else node)
            assert called not in ("input", "sys.stdin", "getpass.getpass"), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and called in (
                "subprocess.Popen",
                "subprocess.run",
                "subprocess.check_output",
            ):
                assert {"stdin", "input"} & {word.arg for word in node.keywords}, (
                    f"{path}:{node.lineno}: {called} without stdin"
                )


def test_every_broad_except_gives_its_reason() -> None:
    for path in product_files():
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ExceptHandler):
                is_broad = node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                )
                around = "\n".join(lines[max(0, node.lineno - 2) : node.lineno + 1])
                assert not is_broad or "#" in around, f"{path}:{node.lineno}"


def test_file_names_say_something() -> None:
    for path in product_files():
        assert path.stem not in EMPTY_NAMES, path


def test_the_map_of_the_house_names_every_file() -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs" / "architecture.md").read_text()))
    of_a_room = {"__init__", "__main__"}
    missing = [path for path in product_files() if path.stem not in words | of_a_room and path.parts[-2] != "sections"]
    assert not missing


def test_actors_and_learner_do_not_print() -> None:
    for path in product_files():
        if path.parts[-2] in ("actors", "learner"):
            calls = [
                n
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
            ]
            has_command_line = 'if __name__ == "__main__"' in path.read_text()
            assert has_command_line or not any(call.func.id == "print" for call in calls), path


MADE_FIRST = {"photos.yaml": ["model.path=examples/digits/model"]}
"""Example → what stands in for a folder that a command makes, which a clone lacks."""


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_example_passes_the_checks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check(load(path, MADE_FIRST.get(path.name, [])))

"""What comments, docstrings and documents name exists: modules, what is in them, members, files, programs, configuration keys.

Names are looked up in the source, which nothing here imports. A name is ours when its first word is a package of ours, a module that
the file imports or stands beside, a class of its package, or a section of the configuration. In backticks a name must begin with one
of these, with a word of the file's own code, or with an installed package.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.architecture.test_imports import PRODUCT, ROOT, module_name
from tests.config.keys import keys

OURS = {*PRODUCT, "bench", "tests", "examples"}
SOURCES = sorted(path for package in PRODUCT for path in (ROOT / package).rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STORED = {"py", "md", "json", "jsonl", "yaml", "toml", "parquet", "png", "partial"}
OF_OTHERS = {
    "monarch": "Monarch's own names",
    "memory": "files of a control group",
    "file": "any file",
    "section": "any section of the configuration",
    "name": "any argument of an endpoint",
    "lm_head": "a tensor of the model",
}
EMPTY_BASES = {"Protocol", "ABC", "Struct", "NamedTuple", "Generic", "Exception", "RuntimeError", "ValueError"}

NAME = re.compile(r"(?<![\w./:<>{}-])[A-Za-z_]\w*(?:\[\w*\])?(?:\.[A-Za-z_]\w*(?:\[\w*\])?)+")
PATH = re.compile(r"(?<![\w./:<>{}*-])[\w.-]+(?:/[\w.-]+)+/?(?![\w*{<])")
OF_A_REPOSITORY = re.compile(r" of [\w-]+/[\w-]+")
IMPORT = re.compile(rf"from ((?:{'|'.join(sorted(OURS))})[\w.]*) import ([\w, ]+)")
PROGRAM = re.compile(r"python -m ([\w.]+)")
KEYS = {re.sub(r"\[\]", "", key.name) for key in keys()}
SECTIONS = {key.split(".")[0] for key in KEYS}
INSTALLED = {*packages_distributions(), *sys.stdlib_module_names}


class Module:
    """One source file: the names at its top and the members of its classes."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text())
        self.name = module_name(path)
        self.room = self.name if path.name == "__init__.py" else self.name.rpartition(".")[0]
        self.classes = {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)}
        self.imported: dict[str, str] = {}
        self.words: set[str] = set()
        for node in ast.walk(self.tree):
            match node:
                case ast.Import(names=aliases):
                    self.imported |= {a.asname or a.name.split(".")[0]: a.name for a in aliases}
                case ast.ImportFrom(module=base, names=aliases):
                    self.imported |= {a.asname or a.name: f"{base}.{a.name}" for a in aliases}
                case ast.Name(id=word) | ast.arg(arg=word) | ast.Attribute(attr=word):
                    self.words.add(word)
        self.top = set(self.imported) | {name for node in self.tree.body for name in bound(node)}


def bound(node: ast.stmt) -> Iterator[str]:
    """Names that a statement gives a meaning to, those inside `if` and `try` included."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Assign() | ast.AnnAssign():
            yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))
        case ast.If() | ast.Try() | ast.With():
            for inner in node.body:
                yield from bound(inner)


@cache
def module(name: str) -> Module | None:
    path = ROOT.joinpath(*name.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]
    return Module(files[0]) if files else None


def members(of: ast.ClassDef, home: Module) -> set[str] | None:
    """What instances and the class have; none where a base is somebody else's and could have anything."""
    found = {name for node in of.body for name in bound(node)}
    found |= {
        node.attr
        for node in ast.walk(of)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    for base in of.bases:
        name = ast.unparse(base).split("[")[0].rpartition(".")[2]
        known = class_near(name, home)
        inherited = members(*known) if known else set() if name in EMPTY_BASES else None
        if inherited is None:
            return None
        found |= inherited
    return found


def class_near(name: str, home: Module) -> tuple[ast.ClassDef, Module] | None:
    """The class of this name in the file, among its imports, else the only one of its room, else of its package."""
    if name in home.classes:
        return home.classes[name], home
    if name in home.imported:
        source = module(home.imported[name].rpartition(".")[0])
        return class_near(name, source) if source else None
    for place in (home.room, home.name.split(".")[0]):
        near = [m for path in SOURCES if (m := module(module_name(path))) and f"{m.name}.".startswith(f"{place}.")]
        found = [(m.classes[name], m) for m in near if name in m.classes]
        if len(found) == 1:
            return found[0]
    return None


def is_there(names: list[str], home: Module) -> bool:
    """Whether a module has what the dotted rest names: a module below it, a name, a member of a class."""
    if not names:
        return True
    first, *rest = names
    if below := module(f"{home.name}.{first}"):
        return is_there(rest, below)
    if ROOT.joinpath(*home.name.split("."), first).is_dir():
        return True
    if first not in home.top:
        return False
    if not rest:
        return True
    known = class_near(first, home)
    inside = members(*known) if known else None
    return inside is None or rest[0] in inside


def is_key(name: str) -> bool:
    name = re.sub(r"\[\w*\]", "", name)
    return any(f"{key}.".startswith(f"{name}.") for key in KEYS)


def is_dead(name: str, home: Module | None, *, is_code: bool) -> bool:
    """Whether a dotted name is ours and names nothing. `is_code`: it stands in backticks."""
    first, *rest = name.split(".")
    head = re.sub(r"\[.*", "", first)
    if name in texts_of_code():
        return False
    if rest[-1] in STORED:
        return rest[-1] == "py" and head not in OF_OTHERS and not any(path.name == name for path in SOURCES)
    if head in OURS:
        package = module(head)
        return not (is_there(rest, package) if package else ROOT.joinpath(head, *rest).is_dir())
    if head in SECTIONS and is_key(name):
        return False
    if home is None:
        return head in SECTIONS
    beside = module(home.imported.get(head, f"{home.room}.{head}"))
    if beside and (head in home.imported or head not in home.words):
        return not is_there(rest, beside)
    if known := class_near(head, home):
        inside = members(*known)
        return inside is not None and rest[0] not in inside
    if head in home.words | home.top | INSTALLED | OF_OTHERS.keys():
        return False
    return is_code or head in SECTIONS


def dead_paths(text: str) -> Iterator[str]:
    for match in PATH.finditer(text):
        name = match[0].rstrip("./")
        if OF_A_REPOSITORY.match(text, match.end()):
            continue
        first, last = name.split("/")[0], name.rpartition("/")[2]
        is_metric = name in texts_of_code() or last.startswith("num_")
        is_ours = (first in {*OURS, "docs"} and not is_metric) or last.endswith((".py", ".md"))
        is_within = any(path.as_posix().endswith(f"/{name}") for path in SOURCES)
        if is_ours and not is_within and not (ROOT / name).exists():
            yield name
    for match in PROGRAM.finditer(text):
        parts = match[1].rstrip(".").split(".")
        path = ROOT.joinpath(*parts)
        if parts[0] in OURS and not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            yield match[0]


@cache
def texts_of_code() -> set[str]:
    """Every string of the product's code: metrics' keys are written like paths, a group of entry points like a module."""
    trees = [module(module_name(path)) for path in SOURCES]
    nodes = [node for home in trees if home for node in ast.walk(home.tree)]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, those of fields too, and comments."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def dead_in(text: str, home: Module | None) -> list[str]:
    """Names of ours in a text of a module, or of a document, that name nothing."""
    text = re.sub(r"https?://\S+", "", text)
    found = list(dead_paths(text))
    for index, part in enumerate(re.split(r"`+", text)):
        found += [match[0] for match in NAME.finditer(part) if is_dead(match[0], home, is_code=index % 2 == 1)]
    return found


def dead_imports(program: str) -> Iterator[str]:
    for home, names in IMPORT.findall(program):
        for name in names.split(", "):
            dotted = f"{home}.{name.split(' as ')[0].strip()}"
            if is_dead(dotted, None, is_code=True):
                yield dotted


DEAD = (
    "`vtriune.run.gone`", "vtriune.run.window.gone", "`Window.gone`", "Window.gone", "`hosts.gone`", "`gone.leased`", "`policy.gone`",
    "python -m vtriune.gone", "tests/run/gone.py", "vtriune/gone", "`run/gone.py`", "`gone.py`",
)  # fmt: skip
ALIVE = (
    "`vtriune.run.window`", "vtriune.run.window.Window.admit", "`Window.admit`", "`policy.max_staleness`", "`policy.schedule[].until`",
    "`metrics.jsonl`", "`source/<source>/ledger/consumed`", "python -m vtriune.launch", "tests/run/stage.py", "`run/window.py`",
    "`numpy.ndarray`", "e.g. a word", "docs/gone.md of verl-project/verl", "https://docs.python.org/tests/gone.py",
)  # fmt: skip


@pytest.mark.parametrize(("text", "is_wrong"), [*((text, True) for text in DEAD), *((text, False) for text in ALIVE)])
def test_dead_names_are_told_from_living_ones(text: str, is_wrong: bool) -> None:
    assert bool(dead_in(text, module("vtriune.run.groups"))) == is_wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_comment_or_docstring_names_exists(path: Path) -> None:
    home = module(module_name(path))
    assert not [f"{line}: {name}" for line, text in prose(path) for name in dead_in(text, home)]


@pytest.mark.parametrize("package", sorted(OURS))
def test_what_a_program_written_as_a_string_imports_exists(package: str) -> None:
    dead = []
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                dead += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in dead_imports(node.value)]
    assert not dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [f"{line}: {name}" for line, text in lines for name in dead_in(text, None)]

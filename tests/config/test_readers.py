"""A key that nothing reads promises what does not happen: every key has a reader outside of `vtriune/config`."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from tests.config.keys import keys
from vtriune.config import Config

ROOT = Path(__file__).parents[2]
PRODUCT = ("vtriune", "actors", "learner", "verifiers")

STRUCTS = {
    owner.__name__: owner
    for struct in (Config, *get_type_hints(Config).values(), *(key.struct for key in keys()))
    for owner in struct.__mro__[: struct.__mro__.index(msgspec.Struct)]
}
"""Every section by its name, the library's options that one is made of included."""
HELD_AS = {"config": "Config", "options": "RewardOptions"}
"""Attributes that hold a section, whatever object they are of."""
OF_THE_LIBRARY = {name: owner for name, owner in STRUCTS.items() if not owner.__module__.startswith("vtriune.")}


class Reads(ast.NodeVisitor):
    """Keys that one module reads, as (struct, field).

    An attribute counts only where its base is known to be a section: an argument or field annotated with the section's class, a
    chain that begins at one or at an attribute of `HELD_AS`, and whatever name such a value is bound to. So `self.name` of
    anything else is no reader of `run.name`. Two passes, because a method may use what a later one binds.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self._classes: dict[str, str] = {}
        self._scopes: list[dict[str, Any]] = [{}]
        self._members: dict[str, dict[str, Any]] = {}
        self._of_self: dict[str, Any] = {}
        self._own: type | None = None

    def read(self, source: str) -> "Reads":
        tree = ast.parse(source)
        for _ in range(2):
            self.visit(tree)
        return self

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name in STRUCTS and (node.module or "").startswith(("vtriune.config", "verifiers")):
                self._classes[alias.asname or alias.name] = alias.name

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer = self._of_self, self._own
        self._of_self, self._own = self._members.setdefault(node.name, {}), OF_THE_LIBRARY.get(node.name)
        for field in (below for below in node.body if isinstance(below, ast.AnnAssign)):
            if (kind := self._annotated(field.annotation)) is not None:
                self._of_self[ast.unparse(field.target)] = kind
        self.generic_visit(node)
        self._of_self, self._own = outer

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name in ("problems", "__post_init__"):
            return  # To refuse a value is not to use it.
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self._scopes.append({a.arg: self._annotated(a.annotation) for a in arguments} | {"self": self._own})
        self.generic_visit(node)
        self._scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._bind(node.target, self._annotated(node.annotation))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=True):
                    self._bind(one, self._type_of(value))
            else:
                self._bind(target, self._type_of(node.value))
        self.generic_visit(node)

    def visit_For(self, node: ast.For | ast.comprehension) -> None:
        match node.iter, node.target:
            case ast.Call(func=ast.Name(id="enumerate"), args=[items]), ast.Tuple(elts=[_, target]):
                self._bind(target, self._item(self._type_of(items)))
            case items, target:
                self._bind(target, self._item(self._type_of(items)))
        self.generic_visit(node)

    visit_comprehension = visit_For

    def visit_GeneratorExp(self, node: Any) -> None:
        # Its element stands before its loops in the tree.
        for loop in node.generators:
            self.visit(loop)
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._type_of(node)
        self.generic_visit(node)

    def _bind(self, target: ast.expr, kind: Any) -> None:
        if isinstance(target, ast.Name):
            self._scopes[-1][target.id] = kind
        elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self" and kind is not None:
            self._of_self[target.attr] = kind

    def _annotated(self, annotation: ast.expr | None) -> Any:
        """The section that an annotation names, alone or in a union."""
        named = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)] if annotation else []
        return next((STRUCTS[self._classes[name]] for name in named if name in self._classes), None)

    def _type_of(self, node: ast.expr) -> Any:
        """The section or list of sections that an expression is; None for everything else. Notes what is read on the way."""
        match node:
            case ast.Name(id=name):
                return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)
            case ast.BoolOp(values=values):
                return next((kind for value in values if (kind := self._type_of(value)) is not None), None)
            case ast.Subscript(value=value):
                return self._item(self._type_of(value))
            case ast.Attribute(value=ast.Name(id="self"), attr=attr) if attr in self._of_self:
                return self._of_self[attr]
            case ast.Attribute(value=base, attr=attr):
                struct = self._type_of(base)
                if struct is None:
                    return STRUCTS.get(HELD_AS.get(attr, ""))
                if isinstance(struct, type) and attr in get_type_hints(struct):
                    self.found.add((struct.__name__, attr))
                    return self._section(get_type_hints(struct)[attr])
        return None

    @staticmethod
    def _section(hint: Any) -> Any:
        is_section = isinstance(hint, type) and issubclass(hint, msgspec.Struct)
        return hint if is_section or any(item in STRUCTS.values() for item in get_args(hint)) else None

    @staticmethod
    def _item(hint: Any) -> Any:
        return next((item for item in get_args(hint) if item in STRUCTS.values()), None)


def readers() -> Iterator[Path]:
    """Every module of the product but those that only hold the configuration; what a mode is, `modes` tells the run."""
    for package in PRODUCT:
        for path in sorted((ROOT / package).rglob("*.py")):
            if ROOT / "vtriune" / "config" not in path.parents or path.name == "modes.py":
                yield path


def unread(sources: Iterable[str]) -> set[str]:
    found = set().union(*(Reads().read(source).found for source in sources))
    return {key.name for key in keys() if not any((owner.__name__, key.field) in found for owner in key.struct.__mro__)}


def test_every_key_is_read_by_a_module_outside_of_the_configuration() -> None:
    assert unread(path.read_text() for path in readers()) == set()


READ = [
    "from vtriune.config.tree import Config\ndef f(config: Config): return config.run.name",
    "from vtriune.config import Config\ndef f(config: Config):\n run, x = config.run, 1\n return run.name",
    "from vtriune.config.tree import Run as Section\ndef f(section: Section): return section.name",
    "from vtriune.config.tree import Run\nclass A:\n def f(self): self._r.name\n def __init__(self, r: Run): self._r = r",
    "class A:\n def f(self, learner): return learner.config.run.name",
]
NOT_READ = [
    "class A:\n def f(self): return self.name",
    "def f(run): return run.name",
    "from vtriune.config.tree import Model\ndef f(model: Model): return model.name",
    "from vtriune.config.tree import Config\ndef f(config: Config): return config.run",
    "def f(policy): return policy.model.config.name",
]


@pytest.mark.parametrize(("source", "is_reader"), [*((s, True) for s in READ), *((s, False) for s in NOT_READ)])
def test_a_common_word_on_something_else_is_no_reader(source: str, is_reader: bool) -> None:
    assert ("run.name" not in unread([source])) == is_reader


def test_a_key_of_a_listed_section_counts_when_its_items_are_read() -> None:
    loop = "from vtriune.config.tree import Policy\ndef f(policy: Policy):\n for phase in policy.schedule: phase.until"
    assert "policy.schedule[].until" not in unread([loop])
    item = "from vtriune.config.tree import Policy\ndef f(policy: Policy): return [p.mode for p in policy.schedule]"
    assert "policy.schedule[].mode" not in unread([item])

"""The configuration as a document, read from the sections' own source: `launch --help-config` and docs/configuration.md.

python -m vtriune.config.document > docs/configuration.md
"""

import argparse
import ast
import difflib
import inspect
import math
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, get_type_hints

import msgspec
import yaml

from verifiers import terminal
from vtriune.config.changes import RULES
from vtriune.config.kinds import kind_of
from vtriune.config.load import is_struct, struct_within
from vtriune.config.tree import Config

_HEAD = """\
# Configuration

Every key of a run's YAML file, with what it takes, its default and what it does. A file holds the keys that differ from their
defaults, in sections; on the command line a key is written `section.key=value`. In a path `~` is the home of whoever starts the run.
An integer ≥ 1 goes up to a billion. The same text: `python -m vtriune.launch --help-config [section]`. Written by
`python -m vtriune.config.document` from the sections in `vtriune/config/sections`.
"""

_CHANGES = """\
## What may change when a run goes on from a checkpoint

The same command resumes a run, and it may come with other values. Those of the start before are in the run's folder: a change that is
refused ends the command before anything starts; every other one is said on the terminal and in the log, and the configuration of every
start is kept in `config/`. A section's rule holds for its keys that have none of their own.
"""


class Key(NamedTuple):
    """One key: `policy.max_staleness`, what it takes, its default as a file would say it, what it does."""

    name: str
    kind: str
    default: str
    text: str


class Part(NamedTuple):
    """A section, a section within one, or (`policy.schedule[]`) one entry of a list."""

    name: str
    text: str
    keys: list[Key]


def parts() -> list[Part]:
    """The whole tree, sections in the order of the file, each before what is within it."""
    shown: set[type] = set()
    return [part for field in msgspec.structs.fields(Config) for part in _parts(field.name, field.type, shown)]


def _parts(name: str, struct: type, shown: set[type]) -> Iterator[Part]:
    """`shown`: what entries of lists that came before are made of, which stands there."""
    hints, texts = get_type_hints(struct, include_extras=True), _texts(struct)
    own = [field for field in msgspec.structs.fields(struct) if not is_struct(hints[field.name])]
    keys = [Key(f"{name}.{f.name}", kind_of(hints[f.name]), _default(f), texts.get(f.name, "")) for f in own]
    yield Part(name, inspect.cleandoc(struct.__doc__ or ""), keys)
    for field, hint in hints.items():
        within, suffix = (hint, "") if is_struct(hint) else (struct_within(hint), "[]")
        if within is not None and within not in shown:
            if suffix:
                shown.add(within)
            yield from _parts(f"{name}.{field}{suffix}", within, shown)


@cache
def _texts(struct: type) -> dict[str, str]:
    """The string literal under each key, those of base classes included."""
    texts: dict[str, str] = {}
    for owner in reversed(struct.__mro__[: struct.__mro__.index(msgspec.Struct)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for key, below in pairwise(body):
            match key, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "(required)"
    return _yaml(field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory())


def _yaml(value: Any) -> str:
    return yaml.safe_dump(
        msgspec.to_builtins(value), default_flow_style=True, sort_keys=False, width=math.inf
    ).partition("\n")[0]


def help_text(name: str | None = None) -> str:
    """For a terminal of 80 columns: everything, or what stands at and below `name`, a section or a key.

    Raises LookupError, which names the nearest ones, when there is no `name`.
    """
    chosen = parts()
    if name is not None:
        names = [known for part in chosen for known in (part.name, *(key.name for key in part.keys))]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or [part.name for part in chosen]
            raise LookupError(f"no section or key {name}; there is {', '.join(near)}")
        below = (f"{name}.", f"{name}[].")
        chosen = [part._replace(keys=[k for k in part.keys if f"{k.name}.".startswith(below)]) for part in chosen]
    return "\n\n".join(_as_text(part) for part in chosen if part.keys or name in (None, part.name))


def _as_text(part: Part) -> str:
    lines = [_filled(f"{part.name}: {part.text}", 80)]
    for key in part.keys:
        own_name = key.name.removeprefix(f"{part.name}.")
        lines += ["", _filled(f"{own_name} = {key.default}    {key.kind}", 80, indent=2, hanging=6)]
        lines += [_filled(key.text, 80, indent=6)] if key.text else []
    return "\n".join(lines)


def markdown() -> str:
    """docs/configuration.md."""
    blocks = [_HEAD]
    for part in parts():
        heading = "##" if "." not in part.name else "###"
        keys = [
            f"- **`{k.name}`**: {k.kind}; default `{k.default}`.  \n{_filled(k.text, 136, indent=2)}" for k in part.keys
        ]
        blocks.append("\n".join([f"{heading} {part.name}\n\n{_filled(part.text, 136)}\n", *keys, ""]))
    rules = (
        f"**`{key}`** {'may change' if rule.is_free else 'is refused'}: {rule.text}." for key, rule in RULES.items()
    )
    blocks.append("\n".join([_CHANGES, *(_filled(f"- {rule}", 136, hanging=2) for rule in rules), ""]))
    return "\n".join(blocks)


def _filled(text: str, width: int, *, indent: int = 0, hanging: int | None = None) -> str:
    further = indent if hanging is None else hanging
    return textwrap.fill(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * further, break_on_hyphens=False
    )


class HelpConfig(argparse.Action):
    """`--help-config [section]` of a command that reads a configuration file: print and end, no file needed."""

    def __call__(self, parser: argparse.ArgumentParser, _namespace: object, value: Any, _option: object = None) -> None:
        try:
            print(help_text(value))
        except LookupError as error:
            parser.error(str(error.args[0]))
        parser.exit()


if __name__ == "__main__":
    terminal.open_output()
    print(markdown(), end="")

"""YAML file + command-line overrides → `Config`; errors name file, key and the nearest known key. Called by command lines."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import yaml

from vtriune.config.kinds import kind_of
from vtriune.config.tree import Config


class ConfigError(ValueError):
    """A configuration that cannot be run: says which key of which file, and what to write instead."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` and apply `section.key=value` overrides, values in YAML syntax.

    Raises ConfigError for an unreadable file, and with one line for each unknown key and each value of a wrong type or out of
    range. What keys cannot say together is left to `check`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}; save it as UTF-8") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}, not sections; see examples/digits.yaml")
    return _convert(_merged(tree, overrides), str(path))


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `section.key=value` applied; raises ConfigError like `load`."""
    return _convert(_merged(msgspec.to_builtins(config), overrides), "command line")


def to_yaml(config: Config) -> str:
    """Every key with its value, so that the file alone reproduces the run."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, width=120)


def _merged(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    merged = dict(tree)
    for item in overrides:
        dotted, separator, text = item.partition("=")
        *sections, key = dotted.split(".")
        if not separator or not sections:
            raise ConfigError(f"override {item!r}: write section.key=value, for example policy.mode=off_policy")
        node = merged
        for depth, name in enumerate(sections, 1):
            below = node.get(name) or {}
            if not isinstance(below, Mapping):
                raise ConfigError(f"override {item!r}: {'.'.join(sections[:depth])} has no keys below it")
            node[name] = dict(below)
            node = node[name]
        try:
            node[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"override {item!r}: {text!r} is not a YAML value; text that holds brackets, commas or colons takes quotes"
            ) from error
    return merged


def _convert(tree: Mapping[str, Any], where: str) -> Config:
    tree = _with_lists(_as_yaml_1_2(tree), Config)
    problems = list(key_problems(tree, Config))
    if problems:
        raise ConfigError("\n".join(f"{where}: {line}" for line in problems))
    # strict=False would turn "2" into 2 and hide typing slips; 1 for a float is accepted in strict mode too.
    return msgspec.convert(tree, Config)


def _with_lists(tree: Any, struct: type) -> Any:
    """A lone text where a list of texts is asked for is a list of one: `data.train: rows.parquet`."""
    if not isinstance(tree, Mapping):
        return tree
    hints = get_type_hints(struct)
    return {key: _with_list(value, hints.get(key)) for key, value in tree.items()}


def _with_list(value: Any, hint: Any) -> Any:
    if is_struct(hint):
        return _with_lists(value, hint)
    if get_origin(hint) not in (list, tuple):
        return value
    entry = struct_within(hint)
    if isinstance(value, str) and str in (members := get_args(hint)[0], *get_args(members)):
        value = [value]
    is_lone = entry is not None and isinstance(value, Mapping)
    if entry is None or not isinstance(value, list | Mapping):
        return value
    return [_with_lists(each, entry) for each in ([value] if is_lone else value)]


def key_problems(tree: Any, struct: type, prefix: str = "") -> Iterable[str]:
    """One line for every key that `struct` does not know or misses, and for every value of a wrong type or out of its range."""
    if not isinstance(tree, Mapping):
        yield f"{prefix.rstrip('.') or 'configuration'}: expected keys, got {tree!r}"
        return
    hints = get_type_hints(struct, include_extras=True)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(hints)}"
            yield f"unknown key {prefix}{key}{hint}"
        else:
            yield from _value_problems(value, hints[key], f"{prefix}{key}")
    for field in msgspec.structs.fields(struct):
        if field.required and field.name not in tree:
            yield f"{prefix}{field.name}: missing, and it has no default"


def _value_problems(value: Any, hint: Any, key: str) -> Iterable[str]:
    entry, below = struct_within(hint), []
    if is_struct(hint):
        below = list(key_problems(value, hint, f"{key}."))
    elif entry is not None and isinstance(value, list):
        # An entry that may be a text as well is asked for its keys only where it has some.
        has_keys = (isinstance(one, Mapping) or entry in get_args(hint) for one in value)
        below = [
            line
            for index, (one, is_asked) in enumerate(zip(value, has_keys, strict=True))
            if is_asked
            for line in key_problems(one, entry, f"{key}[{index}].")
        ]
    if below:
        yield from below
        return
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        # What a struct itself has to say, in its `__post_init__`, is asked once its keys are right.
        own = str(error).partition(" - at `$")[0].splitlines()
        yield from own if is_struct(hint) else [f"{key}: expected {kind_of(hint)}, got {value!r}"]


def is_struct(hint: Any) -> bool:
    """Whether a key of this type holds keys of its own."""
    return isinstance(hint, type) and issubclass(hint, msgspec.Struct)


def struct_within(hint: Any) -> type | None:
    """The struct whose keys the entries of such a list have, or may have."""
    members = [each for argument in get_args(hint) for each in (argument, *get_args(argument))]
    return next(filter(is_struct, members), None)


_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _as_yaml_1_2(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as a string and `wandb: off` as false; nobody means that."""
    if isinstance(value, Mapping):
        return {key: "off" if key == "wandb" and item is False else _as_yaml_1_2(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_yaml_1_2(item) for item in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value

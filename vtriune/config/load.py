"""YAML file + command-line overrides → `Config`; errors name file, key and the nearest known key. Called by command lines."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import yaml

from vtriune.config.tree import Config


class ConfigError(ValueError):
    """A configuration that cannot be run: says which key of which file, and what to write instead."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` and apply `section.key=value` overrides, values in YAML syntax.

    Raises ConfigError for an unreadable file, an unknown key or a value of the wrong type. Pairs of values are `check`'s affair.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing YAML file") from error
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
    merged = {name: dict(keys) if isinstance(keys, Mapping) else keys for name, keys in tree.items()}
    for item in overrides:
        dotted, separator, text = item.partition("=")
        parts = dotted.split(".")
        if not separator or len(parts) < 2:
            raise ConfigError(f"override {item!r}: write section.key=value, for example policy.mode=off_policy")
        node: Any = merged
        for depth, part in enumerate(parts[:-1], 1):
            node[part] = dict(node.get(part) or {})
            node = node[part]
            if depth < len(parts) - 1 and not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {'.'.join(parts[:depth])} has no keys below it")
        try:
            node[parts[-1]] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {item!r}: {text!r} is not a YAML value") from error
    return merged


def _convert(tree: Mapping[str, Any], where: str) -> Config:
    unknown = list(_unknown_keys(tree, Config, ""))
    if unknown:
        raise ConfigError("\n".join(f"{where}: {line}" for line in unknown))
    try:
        # strict=False would turn "2" into 2 and hide typing slips; 1 for a float is accepted in strict mode too.
        return msgspec.convert(_as_yaml_1_2(tree), Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_readable(str(error))}") from error


def _unknown_keys(tree: Any, struct: type, prefix: str) -> Iterable[str]:
    if not isinstance(tree, Mapping):
        if tree is not None:
            yield f"{prefix.rstrip('.')}: expected keys, got {tree!r}"
        return
    hints = get_type_hints(struct)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(hints)}"
            yield f"unknown key {prefix}{key}{hint}"
        elif isinstance(hints[key], type) and issubclass(hints[key], msgspec.Struct):
            yield from _unknown_keys(value, hints[key], f"{prefix}{key}.")


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


def _readable(message: str) -> str:
    """msgspec's `Expected int, got str - at $.run.seed` → `run.seed: expected int, got str`."""
    match = re.fullmatch(r"(.*) - at `\$\.(.*)`", message, re.DOTALL)
    return f"{match[2]}: {match[1][0].lower()}{match[1][1:]}" if match else message

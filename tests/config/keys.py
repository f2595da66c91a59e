"""The configuration tree as tests walk it: every key with its declared type, those of listed structs included."""

from collections.abc import Iterator
from typing import NamedTuple

from msgspec import inspect

from vtriune.config import Config


class Key(NamedTuple):
    """`policy.schedule[].until` is a key of the structs that `policy.schedule` lists."""

    name: str
    struct: type
    field: str
    kind: inspect.Type


def keys() -> Iterator[Key]:
    """Every key that holds a value, in the tree's order; those of a struct that several keys list, once."""
    yield from _below("", Config, set())


def _below(prefix: str, struct: type, listed: set[type]) -> Iterator[Key]:
    whole = inspect.type_info(struct)
    assert isinstance(whole, inspect.StructType)
    for field in whole.fields:
        name = prefix + field.name
        if isinstance(field.type, inspect.StructType):
            yield from _below(f"{name}.", field.type.cls, listed)
            continue
        yield Key(name, struct, field.name, field.type)
        items = getattr(field.type, "item_type", None)
        for item in (items, *getattr(items, "types", ())):
            if isinstance(item, inspect.StructType) and item.cls not in listed:
                listed.add(item.cls)
                yield from _below(f"{name}[].", item.cls, listed)

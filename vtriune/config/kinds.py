"""What a key takes, in words: `an integer ≥ 1 or null`. For the loader's errors and for the generated documentation."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta

from vtriune.config.sections.section import MOST

_PLAIN = {Any: "anything", bool: "true or false", str: "text", int: "an integer", float: "a number", NoneType: "null"}


def kind_of(hint: Any) -> str:
    """The values that a key of this type takes, in the order of its declaration."""
    arguments = get_args(hint)
    match get_origin(hint):
        case None:
            return _PLAIN.get(hint) or f"{{{', '.join(hint.__struct_fields__)}}}"
        case origin if origin is Annotated:
            return kind_of(arguments[0]) + "".join(_range(meta) for meta in arguments[1:])
        case origin if origin is Literal:
            return " or ".join(arguments)
        case origin if origin in (Union, UnionType):
            return " or ".join(kind_of(member) for member in arguments)
        case origin if origin is dict:
            return f"{{name: {kind_of(arguments[1])}}}"
        case origin if origin is tuple and ... not in arguments:
            return f"[{', '.join(map(kind_of, arguments))}]"
        case _:
            return f"a list of {kind_of(arguments[0])}"


def _range(meta: Meta) -> str:
    """` in (0, 1]`; a parenthesis excludes its end, a bracket does not. ` ≥ 1`: up to `MOST`. Every range of numbers has two ends."""
    if meta.pattern is not None:
        return f" ({meta.pattern})"
    if meta.min_length is not None:
        return " (not empty)"
    if meta.le == MOST:
        return f" ≥ {meta.ge}"
    low = f"[{meta.ge:.10g}" if meta.ge is not None else f"({meta.gt:.10g}"
    high = f"{meta.le:.10g}]" if meta.le is not None else f"{meta.lt:.10g})"
    return f" in {low}, {high}"

"""The signature of an endpoint or constructor as its wire schema. Used by callers and by the actor that is called.

Annotations decide what may be sent: msgspec structs, scalars, containers, `bytes`, NumPy arrays and references to other
actors (annotated with the actor's class, or with any class that declares the same endpoints).
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from vtriune.transport.codec import Schema

_MAX_SHAPES = 64

references: dict[type, Any] = {}
"""Classes whose subclasses travel as references, each with the generic class that stands for one on the wire: meshes enter
`ActorMesh` for actors and for roles. Importing any module of this package fills it, since the package itself imports meshes."""


class Signature:
    """Parameters and result of an endpoint or constructor, as schemas.

    Raises TypeError: annotations that cannot be resolved or cannot travel.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.label = method.__qualname__
        try:
            hints = typing.get_type_hints(method, include_extras=True)
        except NameError as error:
            raise TypeError(f"{self.label}: {error}; annotations of endpoints must be importable at run time") from None
        parameters = parameters_of(method)
        self._parameters = {parameter.name: _travelling(hints[parameter.name]) for parameter in parameters}
        self._required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
        self._keyword_only = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        self.by_shape: dict[tuple[int, tuple[str, ...]], Schema] = {}
        self.result = Schema(("result",), (_travelling(hints.get("return", Any)),))

    def arguments(self, num_positional: int, names: tuple[str, ...]) -> Schema:
        """The schema of a call with this many positional arguments and these keywords.

        Raises TypeError: the endpoint cannot be called so.
        """
        schema = self.by_shape.get((num_positional, names))
        if schema is None:
            schema = self._bind(num_positional, names)
            if len(self.by_shape) < _MAX_SHAPES:
                self.by_shape[num_positional, names] = schema
        return schema

    def build(self) -> None:
        """Build the schema of the call that gives every argument, in its shortest form: the rest, on first use, then
        find their types known."""
        keyword_only = tuple(name for name in self._parameters if name in self._keyword_only)
        self.arguments(len(self._parameters) - len(keyword_only), keyword_only)

    def _bind(self, num_positional: int, names: tuple[str, ...]) -> Schema:
        positional = [name for name in self._parameters if name not in self._keyword_only]
        if num_positional > len(positional):
            raise TypeError(f"{self.label} takes {len(positional)} positional arguments, got {num_positional}")
        given = [*positional[:num_positional], *names]
        for name in names:
            if name not in self._parameters:
                raise TypeError(f"{self.label} has no parameter {name!r}; it has {list(self._parameters)}")
        if len(set(given)) != len(given):
            raise TypeError(f"{self.label} got an argument twice: {given}")
        missing = [name for name in self._parameters if name in self._required and name not in given]
        if missing:
            raise TypeError(f"{self.label} misses arguments {missing}")
        return Schema(given, [self._parameters[name] for name in given])


def _travelling(annotation: Any) -> Any:
    """The annotation with classes that travel as references replaced by what stands for them on the wire."""
    if (reference := reference_to(annotation)) is not None:
        return reference[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if not arguments or origin is typing.Literal or origin in references.values():
        return annotation
    if origin is typing.Annotated:
        return typing.Annotated[(_travelling(arguments[0]), *arguments[1:])]
    replaced = tuple(_travelling(argument) for argument in arguments)
    if replaced == arguments:
        return annotation
    if origin in (typing.Union, types.UnionType):
        return typing.Union[replaced]  # noqa: UP007 - built at run time
    return origin[replaced]


def reference_to(annotation: Any) -> Any:
    """The generic class that stands on the wire for a class of actors or a role; None for everything else."""
    # Not by issubclass, which a Protocol refuses.
    return next((references[base] for base in getattr(annotation, "__mro__", ()) if base in references), None)


def parameters_of(method: Callable[..., Any]) -> list[inspect.Parameter]:
    """What a method takes beside `self`: nothing, if it is a constructor that no class has written.

    Raises TypeError: a parameter that cannot be a wire schema.
    """
    parameters = [] if method is object.__init__ else list(inspect.signature(method).parameters.values())[1:]
    for parameter in parameters:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise TypeError(f"{method.__qualname__}: {parameter} has no wire schema; name every parameter")
        if parameter.annotation is inspect.Parameter.empty:
            raise TypeError(f"{method.__qualname__}: annotate parameter {parameter.name!r}: it is the wire schema")
    return parameters

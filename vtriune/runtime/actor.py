"""Actors and endpoints as users declare them, and the signature of an endpoint as its wire schema.

An endpoint's annotations decide what may be sent: msgspec structs, scalars, containers, `bytes`, NumPy arrays and
references to other actors (annotated with the actor's class, or with any class that declares the same endpoints).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from vtriune.runtime.failure import MeshFailure
from vtriune.runtime.future import Future, Stream
from vtriune.runtime.shape import Extent, ValueMesh
from vtriune.transport.codec import Schema

P = ParamSpec("P")
R = TypeVar("R")

_MAX_SHAPES = 64
# Names a mesh needs for itself; an endpoint may not take them.
RESERVED = frozenset(
    [
        "slice",
        "flatten",
        "rename",
        "split",
        "size",
        "sizes",
        "extent",
        "stop",
        "initialized",
        "name",
        "procs",
        "failure",
        "on_failure",
    ]
)


class Endpoint(Generic[P, R]):
    """A method that may be called from other processes. On a mesh it offers the ways to call it.

    Order: calls from one sender to one actor start in the order they were made. Async endpoints run concurrently on
    the actor's loop; sync endpoints run one at a time, in order, on the actor's own thread.
    Arrays and buffers given as arguments must stay unchanged until the call is answered: they are not copied.
    """

    def __init__(self, method: Callable[..., Any], deadline_s: float | None = None) -> None:
        self.method = method
        self.deadline_s = deadline_s
        self.is_async = inspect.iscoroutinefunction(method)
        self.name = method.__name__
        self.__doc__ = method.__doc__

    @functools.cached_property
    def signature(self) -> Signature:
        """The wire schema, resolved on first use."""
        return Signature(self.method)

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Self:
        """On the class the endpoint itself; on an instance, inside its actor, the plain bound method."""
        return self if instance is None else types.MethodType(self.method, instance)  # type: ignore[return-value]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Within the actor, `self.endpoint(...)` is an ordinary method call."""
        raise TypeError(f"{self.name} is an endpoint: use .call, .call_one, .choose, .stream or .broadcast")

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Future[ValueMesh[R]]:
        """Call every rank; the values come as one ValueMesh. The first error of any rank is the call's error."""
        raise self._unbound()

    def call_one(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call the only rank of a mesh of one."""
        raise self._unbound()

    def choose(self, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """Call the living rank with the fewest calls of this process outstanding."""
        raise self._unbound()

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> Stream[R]:
        """Call every rank; replies are yielded as they arrive."""
        raise self._unbound()

    def broadcast(self, *args: P.args, **kwargs: P.kwargs) -> Future[None]:
        """Call every rank without replies. Each rank runs it once, or a MeshFailure says why not; an exception there
        is a MeshFailure at the mesh's owner. Awaiting the future waits until the peers' credit let it go."""
        raise self._unbound()

    def within(self, deadline_s: float) -> Endpoint[P, R]:
        """The same endpoint with a deadline per call: after it the caller gets DeadlineExceeded and the callee's task
        is cancelled. Calls made by the callee inherit what is left."""
        raise self._unbound()

    def _unbound(self) -> TypeError:
        return TypeError(f"{self.name} must be called on a spawned mesh, not on the class")


@overload
def endpoint(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> Endpoint[P, R]: ...
@overload
def endpoint(method: Callable[Concatenate[Any, P], R], /) -> Endpoint[P, R]: ...
@overload
def endpoint(*, deadline_s: float) -> Callable[[Callable[Concatenate[Any, P], Any]], Endpoint[P, Any]]: ...
def endpoint(method: Any = None, /, *, deadline_s: float | None = None) -> Any:
    """Make a method callable from other processes. `@endpoint(deadline_s=5)` gives every call a deadline."""
    if method is None:
        return lambda function: endpoint_of(function, deadline_s)
    return endpoint_of(method, deadline_s)


def endpoint_of(method: Callable[..., Any], deadline_s: float | None) -> Endpoint[..., Any]:
    """Check what can be checked before annotations resolve.

    Raises:
        TypeError: an unannotated parameter or result, or `*args`, `**kwargs`.
    """
    parameters = list(inspect.signature(method).parameters.values())[1:]
    check_parameters(method, parameters)
    if "return" not in method.__annotations__:
        raise TypeError(f"endpoint {method.__qualname__} needs a return annotation: it is the wire schema")
    return Endpoint(method, deadline_s)


def check_parameters(method: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    """Raise TypeError for a parameter that cannot be a wire schema."""
    for parameter in parameters:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise TypeError(f"{method.__qualname__}: {parameter} has no wire schema; name every parameter")
        if parameter.annotation is inspect.Parameter.empty:
            raise TypeError(f"{method.__qualname__}: annotate parameter {parameter.name!r}: it is the wire schema")


class Actor:
    """Base of every actor. Spawned by `procs.spawn(name, Class, *args)`, which returns a mesh of them.

    What `spawn` returns is typed as the class itself, so that editors know its endpoints; the mesh methods below are
    the mesh's and exist on the class for that reason only.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        clash = sorted(name for name, value in vars(cls).items() if isinstance(value, Endpoint) and name in RESERVED)
        if clash:
            raise TypeError(f"{cls.__qualname__}: {clash} are names of the mesh; call these endpoints otherwise")

    def __supervise__(self, failure: MeshFailure) -> bool | Awaitable[bool | None] | None:
        """A process or actor this actor spawned has failed. Return True when that is dealt with; otherwise the failure
        passes to the owner of this actor. May be a coroutine function."""
        return False

    def __cleanup__(self, error: Exception | None) -> Awaitable[None] | None:
        """The actor is being stopped. May be a coroutine function."""
        return None

    if typing.TYPE_CHECKING:

        @property
        def extent(self) -> Extent: ...
        @property
        def sizes(self) -> dict[str, int]: ...
        @property
        def initialized(self) -> Future[None]: ...
        def size(self, dim: str | typing.Sequence[str] | None = None) -> int: ...
        def slice(self, **selection: int | slice) -> Self: ...
        def flatten(self, name: str) -> Self: ...
        def rename(self, **names: str) -> Self: ...
        def split(self, **parts: typing.Sequence[str] | int) -> Self: ...
        def stop(self, reason: str = "") -> Future[None]: ...
        def __len__(self) -> int: ...
        def __iter__(self) -> typing.Iterator[Self]: ...


class Signature:
    """Parameters and result of an endpoint or constructor, as schemas.

    Raises:
        TypeError: annotations that cannot be resolved or cannot travel.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self.label = method.__qualname__
        try:
            hints = typing.get_type_hints(method, include_extras=True)
        except NameError as error:
            raise TypeError(f"{self.label}: {error}; annotations of endpoints must be importable at run time") from None
        parameters = list(inspect.signature(method).parameters.values())[1:]
        check_parameters(method, parameters)
        self._parameters = {parameter.name: _travelling(hints[parameter.name]) for parameter in parameters}
        self._required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
        self._keyword_only = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        self.by_shape: dict[tuple[int, tuple[str, ...]], Schema] = {}
        self.result = Schema(("result",), (_travelling(hints.get("return", Any)),))

    def arguments(self, num_positional: int, names: tuple[str, ...]) -> Schema:
        """The schema of a call with this many positional arguments and these keywords.

        Raises:
            TypeError: the endpoint cannot be called so.
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
    """The annotation with actor classes replaced by the mesh reference that stands for them on the wire."""
    from vtriune.runtime.mesh import ActorMesh

    if isinstance(annotation, type) and issubclass(annotation, Actor):
        return ActorMesh[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if not arguments or origin in (typing.Literal, ActorMesh):
        return annotation
    if origin is typing.Annotated:
        return typing.Annotated[(_travelling(arguments[0]), *arguments[1:])]
    replaced = tuple(_travelling(argument) for argument in arguments)
    if replaced == arguments:
        return annotation
    if origin in (typing.Union, types.UnionType):
        return typing.Union[replaced]  # noqa: UP007 - built at run time
    return origin[replaced]


def class_path(cls: type) -> str:
    """How a child names the class: 'module:Qualname', or 'file.py:Qualname' for one defined in the main script.

    Raises:
        TypeError: a class inside a function, which no other process can import.
    """
    if "<locals>" in cls.__qualname__:
        raise TypeError(
            f"{cls.__qualname__} is defined inside a function; actors must be importable: move it to a module"
        )
    module = cls.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        file = getattr(main, "__file__", None)
        if spec is None and file is None:
            raise TypeError(f"{cls.__qualname__} was typed into an interpreter; actors must stand in a file")
        module = spec.name if spec is not None else str(file)
    return f"{module}:{cls.__qualname__}"


def load_class(path: str) -> type[Actor]:
    """Import an actor class by its path.

    Raises:
        TypeError: the path names something that is no actor class.
    """
    module_name, _, qualname = path.rpartition(":")
    module = _load_script(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    found: Any = module
    for part in qualname.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, Actor)):
        raise TypeError(f"{path} is not an actor class")
    return found


def _load_script(file: str) -> types.ModuleType:
    """The root's main script, imported under a name of its own so that its `if __name__ == "__main__"` does not run."""
    name = "__vtriune_main__"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import actors from {file}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]

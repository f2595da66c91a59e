"""Actors and endpoints as users declare them."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

from vtriune.runtime.future import Future, Stream
from vtriune.runtime.shape import Extent, Shaped, ValueMesh
from vtriune.runtime.signature import Signature, parameters_of
from vtriune.transport.errors import MeshFailure

P = ParamSpec("P")
R = TypeVar("R")

# Names a mesh needs for itself; an endpoint may not take them.
RESERVED = {*dir(Shaped), "initialized", "name", "stop", "to_ref"}


class Endpoint(Generic[P, R]):
    """A method that may be called from other processes. On a mesh it offers the ways to call it.

    Order: calls from one sender to one actor start in the order they were made. Async endpoints run concurrently on
    the actor's loop; sync endpoints run one at a time, in order, on the actor's own thread.
    Arrays and buffers given as arguments must stay unchanged until the call is answered: they are not copied.
    """

    def __init__(self, method: Callable[..., Any], deadline_s: float | None) -> None:
        """Check what can be checked before annotations resolve.

        Raises TypeError: an unannotated parameter or result, or `*args`, `**kwargs`.
        """
        parameters_of(method)
        if "return" not in method.__annotations__:
            raise TypeError(f"endpoint {method.__qualname__} needs a return annotation: it is the wire schema")
        self.method = method
        self.deadline_s = deadline_s
        self.is_async = inspect.iscoroutinefunction(method)
        self.name = method.__name__
        self.__doc__ = method.__doc__

    @functools.cached_property
    def signature(self) -> Signature:
        """The wire schema, resolved on first use."""
        return Signature(self.method)

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
    return functools.partial(Endpoint, deadline_s=deadline_s) if method is None else Endpoint(method, deadline_s)


class ActorReference(typing.Protocol):
    """What a mesh of actors offers besides its endpoints. A Protocol that inherits it and declares endpoints is a role: a
    parameter annotated with it takes any mesh whose actors have endpoints of these names and annotations, and calls
    through it are checked at both ends without either importing the actors' class."""

    if typing.TYPE_CHECKING:

        @property
        def initialized(self) -> Future[None]: ...
        def slice(self, **selection: int | slice) -> Self: ...


class Actor:
    """Base of every actor. Spawned by `ProcMesh.spawn(name, Class, *args)`, which returns a mesh of them.

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
        def stop(self) -> Future[None]: ...
        def __len__(self) -> int: ...
        def __iter__(self) -> typing.Iterator[Self]: ...

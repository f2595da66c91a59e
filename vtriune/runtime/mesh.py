"""Meshes of actors, and the ways to call them. Made by `ProcMesh.spawn`; travel as references in any message."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, get_args

import msgspec

from vtriune.runtime import context, signature
from vtriune.runtime.actor import Actor, ActorReference, Endpoint
from vtriune.runtime.class_path import load_class
from vtriune.runtime.future import CallFuture, Future, GatherFuture, Stream
from vtriune.runtime.node import Node, this_node
from vtriune.runtime.shape import Extent, Shaped, ValueMesh
from vtriune.transport import codec, wire
from vtriune.transport.errors import MeshFailure, MessageRefused
from vtriune.transport.link import Link
from vtriune.transport.wire import Call, PeerRef

A = TypeVar("A", bound=ActorReference)


class MeshRef(msgspec.Struct, frozen=True, array_like=True):
    """An actor mesh on the wire: whoever receives it can call it."""

    name: str
    actor_id: str
    class_path: str
    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    peers: tuple[PeerRef, ...]


class ActorMesh(Shaped[PeerRef], Generic[A]):
    """Actors of one class on the processes of a mesh. Attribute access gives their endpoints.

    Annotate a parameter with the actor's class (or `ActorMesh[Class]`) and calls through it are typed at both ends. A
    parameter annotated with bare `ActorMesh` works too, without importing the class: arguments are then checked by the
    receiver only, and results come as plain msgpack values.
    """

    def __init__(
        self,
        ref: MeshRef,
        actor_class: type | None,
        spawned: Sequence[CallFuture[None]] = (),
        stop: Callable[[], Future[None]] | None = None,
    ) -> None:
        super().__init__(Extent(ref.labels, ref.sizes), ref.peers)
        self.name = ref.name
        self._ref = ref
        self._actor_id = ref.actor_id
        self._actor_class = actor_class
        self._spawned = spawned
        self._stop = stop
        self._node = this_node()
        self._next_choice = 0

    def _with_shape(self, extent: Extent, elements: Sequence[PeerRef]) -> ActorMesh[A]:
        ref = msgspec.structs.replace(self._ref, labels=extent.labels, sizes=extent.sizes, peers=tuple(elements))
        return ActorMesh(ref, self._actor_class, self._spawned)

    def __getattr__(self, name: str) -> BoundEndpoint:
        if name.startswith("__"):
            raise AttributeError(name)
        declared: Any = None
        if self._actor_class is not None:
            declared = getattr(self._actor_class, name, None)
            if not isinstance(declared, Endpoint):
                raise AttributeError(f"{self._ref.class_path} has no endpoint {name!r}")
        bound = BoundEndpoint(self, name, declared, None if declared is None else declared.deadline_s)
        self.__dict__[name] = bound
        return bound

    @property
    def initialized(self) -> Future[None]:
        """Done when every rank's constructor has returned; its error is the first constructor's error. At once in a
        process that only received the mesh: a call there waits for the constructor by itself."""
        ready: Future[None] = Future(self._node.reactor)
        if self._spawned:
            gathered = GatherFuture(self._node.reactor, Extent(["ranks"], [len(self._spawned)]), self._spawned)
            gathered.add_done_callback(lambda done: ready._settle(error=done._error))
        else:
            ready._settle()
        return ready

    def stop(self) -> Future[None]:
        """Run every actor's `__cleanup__` and end it; its process lives on. Idempotent. Only the spawner may."""
        if self._stop is None:
            raise PermissionError(f"{self.name}: only the process that spawned a mesh may stop it, and only whole")
        return self._stop()

    def to_ref(self) -> MeshRef:
        """The reference that travels in messages."""
        return msgspec.structs.replace(self._ref, peers=tuple(map(self._node.whereabouts, self._elements)))

    def __repr__(self) -> str:
        return f"ActorMesh({self.name}: {self._ref.class_path}, {self._extent})"


def mesh_from_ref(ref: MeshRef, annotation: Any = None) -> ActorMesh[Any]:
    """A mesh that can be called, typed by the annotation or by its class where this process has it imported."""
    declared = next(iter(get_args(annotation)), None)
    if signature.reference_to(declared) is None:
        module = ref.class_path.rpartition(":")[0]
        declared = load_class(ref.class_path) if module in sys.modules and not module.endswith(".py") else None
    return ActorMesh(ref, declared)


codec.register(ActorMesh, codec.WireType(MeshRef, ActorMesh.to_ref, mesh_from_ref))
signature.references.update({Actor: ActorMesh, ActorReference: ActorMesh})


class BoundEndpoint(Endpoint[..., Any]):
    """An endpoint of a mesh."""

    def __init__(
        self, mesh: ActorMesh[Any], name: str, declared: Endpoint[..., Any] | None, deadline_s: float | None
    ) -> None:
        self._mesh = mesh
        self.name = name
        self._declared = declared
        self.deadline_s = deadline_s
        self._label = f"{mesh.name}.{name}"
        self._node: Node = mesh._node
        self._signature = None if declared is None else declared.signature
        self._result = codec.UNTYPED_RESULT if declared is None else declared.signature.result

    def within(self, deadline_s: float) -> BoundEndpoint:
        return BoundEndpoint(self._mesh, self.name, self._declared, deadline_s)

    def _pack(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[wire.Payload, tuple[str, ...]]:
        """Check and encode the arguments; also their names.

        Raises:
            TypeError: they do not fit the endpoint.
            MessageRefused: they exceed what a message may hold.
        """
        names = tuple(kwargs)
        values = (*args, *kwargs.values()) if kwargs else args
        try:
            signature, shape = self._signature, (len(args), names)
            if signature is None:
                payload = codec.pack(values)
            else:
                schema = signature.by_shape.get(shape) or signature.arguments(*shape)
                payload = schema.pack(values)
            if payload.num_bytes > wire.PLAIN_BYTES or payload.frames:
                self._node.limits.check(payload)
        except TypeError as error:
            raise TypeError(f"{self._label}: {error}") from None
        except wire.WireError as error:
            raise MessageRefused(f"{self._label}: {error}") from None
        return payload, names

    def _deadline(self, call_end: float) -> float:
        """The endpoint's own deadline or what is left of the running call's, whichever is shorter, in seconds."""
        left_s = max(0.0, call_end - time.monotonic())
        return left_s if self.deadline_s is None else min(left_s, self.deadline_s)

    def _call(
        self, peer: PeerRef, link: Link, packed: tuple[wire.Payload, tuple[str, ...]], num_args: int
    ) -> CallFuture[Any]:
        payload, names = packed
        call_end = context.call_end.get()
        deadline_s = self.deadline_s if call_end is None else self._deadline(call_end)
        if link.credit.by_id and not link.has_room(payload.num_bytes):
            link.wait_for_room(payload.num_bytes, deadline_s)
        future: CallFuture[Any] = CallFuture(self._node.reactor, self._label, peer, self._result, link)
        args = msgspec.Raw(payload.body)
        call = Call(0, self._mesh._actor_id, self.name, args, num_args, names, payload.blobs, False, deadline_s)
        future.call_id = link.submit(call, payload, future)
        return future

    def call_one(self, *args: Any, **kwargs: Any) -> Future[Any]:
        elements = self._mesh._elements
        if len(elements) != 1:
            raise ValueError(
                f"{self._label}.call_one needs a mesh of one, this has {self._mesh.extent}: slice it, or use choose"
            )
        node = self._node
        if asyncio._get_running_loop() is not None:
            node.reactor.attach_running_loop()
        peer = elements[0]
        link = node.links.get(peer.node) or node.link(peer)
        return self._call(peer, link, self._pack(args, kwargs), len(args))

    def choose(self, *args: Any, **kwargs: Any) -> Future[Any]:
        self._node.reactor.attach_running_loop()
        mesh = self._mesh
        packed = self._pack(args, kwargs)
        start = mesh._next_choice
        mesh._next_choice = (start + 1) % len(mesh._elements)
        turn = mesh._elements[start:] + mesh._elements[:start]
        links = [(self._node.link(peer), peer) for peer in turn]
        alive = [(link, peer) for link, peer in links if link.failure is None] or links
        link, peer = min(alive, key=lambda pair: pair[0].num_outstanding)
        return self._call(peer, link, packed, len(args))

    def _call_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[CallFuture[Any]]:
        self._node.reactor.attach_running_loop()
        packed = self._pack(args, kwargs)
        links = [(peer, self._node.link(peer)) for peer in self._mesh._elements]
        return [self._call(peer, link, packed, len(args)) for peer, link in links]

    def call(self, *args: Any, **kwargs: Any) -> Future[ValueMesh[Any]]:
        return GatherFuture(self._node.reactor, self._mesh.extent, self._call_all(args, kwargs))

    def stream(self, *args: Any, **kwargs: Any) -> Stream[Any]:
        return Stream(self._node.reactor, self._call_all(args, kwargs))

    def broadcast(self, *args: Any, **kwargs: Any) -> Future[None]:
        self._node.reactor.attach_running_loop()
        payload, names = self._pack(args, kwargs)
        sent = BroadcastFuture(self._node, len(self._mesh._elements))
        for peer in self._mesh._elements:
            link = self._node.link(peer)
            if not link.has_room(payload.num_bytes):
                link.wait_for_room(payload.num_bytes)
            raw = msgspec.Raw(payload.body)
            call = Call(0, self._mesh._actor_id, self.name, raw, len(args), names, payload.blobs, True)
            link.submit(call, payload, sent)
        return sent


class BroadcastFuture(Future[None]):
    """Done when every rank's connection has taken the message; fails when a rank is known to be gone."""

    def __init__(self, node: Node, num_ranks: int) -> None:
        super().__init__(node.reactor)
        self._num_left = num_ranks

    def resolve(self, value: Any, parts: Sequence[Any], blobs: Sequence[int]) -> None:
        """From a link: handed over."""
        self._num_left -= 1
        if not self._num_left:
            self._settle()

    def fail(self, error: Exception | Any) -> None:
        """From a link: the peer is gone, which its owner is told in any case, whether or not anyone awaits this."""
        self.mark_seen()
        self._settle(error=error if isinstance(error, MeshFailure) else MessageRefused(str(error)))

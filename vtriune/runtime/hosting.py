"""Runs actors inside a worker process: constructors, endpoints, cancellation, cleanup. Used by `vtriune.runtime.worker`.

Async endpoints run on the process's asyncio loop, which also reads the sockets. Constructors and sync endpoints run on
a thread of the actor's own, one at a time in order of arrival, so that they may block without stopping the loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vtriune.runtime import context
from vtriune.runtime.actor import Actor, Endpoint, load_class
from vtriune.runtime.bootstrap import SpawnRequest
from vtriune.runtime.failure import note_from_error
from vtriune.runtime.invocation import construct, endpoints_of, pack_result, prepare, refusal, start_now, unpack
from vtriune.runtime.node import SYSTEM, Node
from vtriune.runtime.shape import Extent, Point
from vtriune.runtime.stacks import own_stacks
from vtriune.transport.codec import Payload, Schema, pack
from vtriune.transport.errors import DeadlineExceeded, MeshFailure
from vtriune.transport.inbox import Session
from vtriune.transport.wire import Call, ErrorNote, FailureNote, WireError

logger = logging.getLogger("vtriune.runtime")


SPAWN = Schema(("request",), (SpawnRequest,))
STOP = Schema(("actor_id",), (str,))

_EXPECT_S = 5.0
# Actors of one process are imported and their schemas built one at a time, for msgspec's sake (see codec). The loop
# never takes it: an import may be long.
_preparing = threading.Lock()

_Early = tuple[Session, Call, Sequence[Any]]


class ActorHost:
    """One actor and everything running in it."""

    def __init__(self, hosting: Hosting, request: SpawnRequest) -> None:
        self.id = request.actor_id
        self.name = request.name
        self.point = Point(request.rank, Extent(request.labels, request.sizes))
        self.class_path = request.class_path
        self.loop = hosting.loop
        self._hosting = hosting
        # What every task of the actor starts from: `current_rank()` and its like.
        self._context = contextvars.Context()
        self._context.run(context.enter, self, None)
        self._limits = hosting.node.limits
        self._defer = hosting.node.reactor.defer
        self._actor: Actor | None = None
        self._endpoints: dict[str, Endpoint[..., Any]] = {}
        self._error: ErrorNote | None = None
        self._early: list[_Early] | None = []
        self._running: dict[tuple[Session, int], asyncio.Task[None] | _SyncCall] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_thread, name=f"actor-{self.name}", daemon=True)
        self._thread.start()

    def _run_thread(self) -> None:
        while (work := self._work.get()) is not None:
            contextvars.Context().run(work)

    # ---- construction

    def construct(self, request: SpawnRequest, on_done: Callable[[ErrorNote | None], None]) -> None:
        """Import the class and run its constructor on the actor's thread; calls that arrive meanwhile wait."""

        def work() -> None:
            context.enter(self, None)
            actor, error = None, None
            try:
                with _preparing:
                    cls = load_class(request.class_path)
                    prepare(cls)
                actor = construct(cls, request)
            except Exception as failure:
                # A constructor may raise anything; it goes to whoever spawned the actor.
                error = note_from_error(failure)
            self.loop.call_soon_threadsafe(self._constructed, actor, error, on_done)

        self._work.put(work)

    def _constructed(
        self, actor: Actor | None, error: ErrorNote | None, on_done: Callable[[ErrorNote | None], None]
    ) -> None:
        self._actor, self._error = actor, error
        self._endpoints = {} if actor is None else endpoints_of(type(actor))
        early, self._early = self._early or [], None
        on_done(error)
        for item in early:
            self.accept(*item)
        self._hosting.node.reactor.run_deferred()

    # ---- calls

    def accept(self, session: Session, call: Call, frames: Sequence[Any]) -> None:
        """Start a call, in order of arrival. Runs on the loop's thread."""
        declared = self._endpoints.get(call.endpoint)
        if self._early is not None:
            self._early.append((session, call, frames))
        elif self._error is not None:
            self._end(session, call, self._error)
        elif declared is None:
            self._end(session, call, refusal(f"{self.class_path} has no endpoint {call.endpoint!r}"))
        elif declared.is_async:
            self._defer(functools.partial(self._start_async, session, call, frames, declared))
        else:
            item = _SyncCall()
            self._running[session, call.id] = item
            self._work.put(lambda: self._run_sync(session, call, frames, declared, item))

    def _start_async(self, session: Session, call: Call, frames: Sequence[Any], declared: Endpoint[..., Any]) -> None:
        """Run the endpoint at once up to its first wait: most never wait, and a turn of the loop costs a message."""
        running = self._run_async(session, call, frames, declared)
        task = start_now(self.loop, running, self._context.copy(), declared.name)
        if not task.done():
            self._running[session, call.id] = task

    async def _run_async(
        self, session: Session, call: Call, frames: Sequence[Any], declared: Endpoint[..., Any]
    ) -> None:
        try:
            args, kwargs = unpack(declared.signature, call, frames, session.peer)
            if call.deadline_s is None:
                value = await declared.method(self._actor, *args, **kwargs)
            else:
                context.enter(self, call.deadline_s)
                value = await self._within(declared.method(self._actor, *args, **kwargs), call.deadline_s)
            answer = pack_result(declared, value, call, self._limits)
        except (Exception, asyncio.CancelledError) as error:
            # Whatever an endpoint raises is its caller's to see.
            self._end(session, call, note_from_error(error))
        else:
            self._end(session, call, answer)

    async def _within(self, call: Any, deadline_s: float) -> Any:
        timeout = asyncio.timeout(deadline_s)
        try:
            async with timeout:
                return await call
        except TimeoutError:
            if timeout.expired():
                raise DeadlineExceeded(f"cancelled after its deadline of {deadline_s:g} s") from None
            raise

    def _run_sync(
        self, session: Session, call: Call, frames: Sequence[Any], declared: Endpoint[..., Any], item: _SyncCall
    ) -> None:
        if item.is_cancelled:
            self._end(session, call, note_from_error(asyncio.CancelledError()))
            return
        context.enter(self, call.deadline_s)
        try:
            args, kwargs = unpack(declared.signature, call, frames, session.peer)
            answer = pack_result(declared, declared.method(self._actor, *args, **kwargs), call, self._limits)
        except Exception as error:
            # Whatever an endpoint raises is its caller's to see.
            self._end(session, call, note_from_error(error))
        else:
            self._end(session, call, answer)

    def _end(self, session: Session, call: Call, answer: Payload | ErrorNote) -> None:
        if self._running:
            self._running.pop((session, call.id), None)
        if call.oneway:
            session.done(call.id)
            if isinstance(answer, ErrorNote):
                self._report(
                    "exception", f"{self.name}.{call.endpoint}: {answer.type_name}: {answer.text}", answer.traceback
                )
        elif isinstance(answer, ErrorNote):
            session.fault(call.id, answer)
        else:
            session.reply(call.id, answer)

    def _report(self, cause: str, detail: str, stacks: str) -> None:
        me = self._hosting.node.me
        logger.error("%s\n%s", detail, stacks)
        self._hosting.node.report(FailureNote(me.mesh, me.rank, me.host, me.pid, cause, detail=detail, stacks=stacks))

    def cancel(self, session: Session, call_id: int) -> None:
        """Cancel an async call's task; a sync one that has not started is dropped, one that runs runs on unheard."""
        running = self._running.get((session, call_id))
        if running is not None:
            running.cancel()

    # ---- supervision and the end

    def supervise(self, failure: MeshFailure) -> None:
        """A process this actor spawned has failed. Called on any thread; unhandled failures go to our own owner."""
        self.loop.call_soon_threadsafe(self._supervise, failure)

    def _supervise(self, failure: MeshFailure) -> None:
        self._supervising = self.loop.create_task(self._ask(failure))

    async def _ask(self, failure: MeshFailure) -> None:
        context.enter(self, None)
        is_handled: Any = False
        try:
            if self._actor is not None:
                is_handled = self._actor.__supervise__(failure)
                if inspect.isawaitable(is_handled):
                    is_handled = await is_handled
        except Exception:
            # A supervisor that fails has not handled the failure: both are reported.
            logger.exception("%s.__supervise__ failed", self.name)
        if not is_handled:
            self._hosting.node.report(failure.note)

    async def stop(self, error: Exception | None) -> None:
        """Cancel what runs, call `__cleanup__`, end the thread."""
        for running in list(self._running.values()):
            running.cancel()
        if self._actor is not None:
            actor, self._actor = self._actor, None
            try:
                context.enter(self, None)
                cleaned: Any = actor.__cleanup__(error)
                if inspect.isawaitable(cleaned):
                    await cleaned
            except Exception:
                # The end goes on; the log says what was not cleaned up.
                logger.exception("%s.__cleanup__ failed", self.name)
        self._error = self._error or refusal(f"actor {self.name} has been stopped")
        self._work.put(None)


class _SyncCall:
    """A sync call waiting for, or running on, the actor's thread."""

    __slots__ = ("is_cancelled",)

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Hosting:
    """The actors of this process, and the system calls that start and end them."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop) -> None:
        self.node = node
        self.loop = loop
        self._hosts: dict[str, ActorHost] = {}
        self._expected: dict[str, list[_Early]] = {}
        node.host_with(self)

    def on_call(self, session: Session, call: Call, frames: Sequence[Any]) -> None:
        """Route a call to its actor."""
        host = self._hosts.get(call.actor)
        if host is not None:
            host.accept(session, call, frames)
        elif call.actor == SYSTEM:
            self._system_call(session, call, frames)
        else:
            self._expect(session, call, frames)

    def _expect(self, session: Session, call: Call, frames: Sequence[Any]) -> None:
        """A reference may overtake the spawn it refers to, coming from another process: hold its calls for a while."""
        waiting = self._expected.get(call.actor)
        if waiting is None:
            waiting = self._expected[call.actor] = []
            self.loop.call_later(_EXPECT_S, self._give_up, call.actor)
        waiting.append((session, call, frames))

    def _give_up(self, actor_id: str) -> None:
        for session, call, _ in self._expected.pop(actor_id, []):
            self._refuse(session, call, f"no actor {actor_id.partition('#')[0]!r} here")

    def _refuse(self, session: Session, call: Call, reason: str) -> None:
        if call.oneway:
            session.done(call.id)
            logger.error("refused a broadcast from %s: %s", session.peer, reason)
        else:
            session.fault(call.id, refusal(reason))

    def on_cancel(self, session: Session, call_id: int) -> None:
        """Cancel a call wherever it runs. After the starts of the same round: the call may be among them."""
        for host in self._hosts.values():
            self.node.reactor.defer(functools.partial(host.cancel, session, call_id))

    def _system_call(self, session: Session, call: Call, frames: Sequence[Any]) -> None:
        try:
            if call.endpoint == "spawn":
                self._spawn(session, call, SPAWN.unpack(call.args, frames, call.blobs)[0])
            elif call.endpoint == "stop":
                self._stop(session, call, STOP.unpack(call.args, frames, call.blobs)[0])
            elif call.endpoint == "stacks":
                session.reply(call.id, pack((own_stacks(),)))
            else:
                self._refuse(session, call, f"no system call {call.endpoint!r}")
        except WireError as error:
            self._refuse(session, call, str(error))

    def _spawn(self, session: Session, call: Call, request: SpawnRequest) -> None:
        host = self._hosts[request.actor_id] = ActorHost(self, request)

        def on_done(error: ErrorNote | None) -> None:
            if error is None:
                session.reply(call.id, pack((None,)))
            else:
                session.fault(call.id, error)

        for early in self._expected.pop(request.actor_id, []):
            host.accept(*early)
        host.construct(request, on_done)

    def revive(self, request: SpawnRequest) -> None:
        """Construct an actor this process had before it was restarted."""
        host = self._hosts[request.actor_id] = ActorHost(self, request)
        me = self.node.me

        def on_done(error: ErrorNote | None) -> None:
            if error is not None:
                detail = f"{request.name}: {error.type_name}: {error.text}"
                note = FailureNote(
                    me.mesh, me.rank, me.host, me.pid, "constructor", detail=detail, stacks=error.traceback
                )
                self.node.report(note)

        host.construct(request, on_done)

    def _stop(self, session: Session, call: Call, actor_id: str) -> None:
        host = self._hosts.get(actor_id)

        async def stop() -> None:
            if host is not None:
                await host.stop(None)
            session.reply(call.id, pack((None,)))

        self._stopping = self.loop.create_task(stop())

    async def stop(self) -> None:
        """Stop every actor, the youngest first."""
        for host in reversed(list(self._hosts.values())):
            await host.stop(None)

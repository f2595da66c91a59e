"""Runs actors inside a worker process: constructors, endpoints, cancellation, cleanup. Used by the worker program.

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
from vtriune.runtime.actor import Actor, Endpoint
from vtriune.runtime.bootstrap import SpawnRequest
from vtriune.runtime.class_path import load_class
from vtriune.runtime.failure import note_from_error
from vtriune.runtime.invocation import construct, endpoints_of, pack_result, start_now, unpack
from vtriune.runtime.node import SYSTEM, Node
from vtriune.runtime.shape import Extent, Point
from vtriune.runtime.stacks import own_stacks
from vtriune.transport.codec import Schema, pack
from vtriune.transport.errors import DeadlineExceeded, MeshFailure
from vtriune.transport.inbox import Session
from vtriune.transport.wire import Call, ErrorNote, FailureNote, Payload, WireError, refusal

logger = logging.getLogger("vtriune.runtime")


SPAWN = Schema(("request",), (SpawnRequest,))
STOP = Schema(("actor_id",), (str,))

_EXPECT_S = 5.0
# Actors of one process are imported and their schemas built one at a time, for msgspec's sake (see codec). The loop
# never takes it: an import may be long.
_preparing = threading.Lock()

_NOTHING = pack((None,))

OnConstructed = Callable[[ErrorNote | None], None]
_Early = tuple[Session, Call, Sequence[Any]]


class ActorHost:
    """One actor and everything running in it."""

    def __init__(self, hosting: Hosting, request: SpawnRequest) -> None:
        self.name = request.name
        self.point = Point(request.rank, Extent(request.labels, request.sizes))
        self.loop = hosting.loop
        self._hosting = hosting
        self._request = request
        # What every task of the actor starts from: `current_rank()` and its like.
        self._context = contextvars.Context()
        self._context.run(context.enter, self, None)
        self._limits = hosting.node.limits
        self._defer = hosting.node.reactor.defer
        self._actor: Actor | None = None
        self._endpoints: dict[str, Endpoint[..., Any]] = {}
        self._error: ErrorNote | None = None
        self._early: list[_Early] | None = []
        self.is_constructed = asyncio.Event()
        """Or has failed to be."""
        self._running: dict[tuple[Session, int], asyncio.Task[None] | None] = {}
        """Async calls by their task; sync ones (None) from their arrival: without its entry, none is started."""
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run_thread, name=f"actor-{self.name}", daemon=True)
        self._thread.start()

    def _run_thread(self) -> None:
        while (work := self._work.get()) is not None:
            contextvars.Context().run(work)

    # ---- construction

    def construct(self, on_done: OnConstructed) -> None:
        """Import the class and run its constructor on the actor's thread; calls that arrive meanwhile wait."""

        def work() -> None:
            context.enter(self, None)
            error = None
            try:
                with _preparing:
                    cls = load_class(self._request.class_path)
                    self._endpoints = endpoints_of(cls)
                    for declared in self._endpoints.values():
                        declared.signature.build()
                self._actor = construct(cls, self._request)
            except BaseException as failure:
                # A constructor may raise anything; it goes to whoever spawned the actor.
                error = self._error = note_from_error(failure)
            self.loop.call_soon_threadsafe(self._constructed, error, on_done)

        self._work.put(work)

    def _constructed(self, error: ErrorNote | None, on_done: OnConstructed) -> None:
        early, self._early = self._early or [], None
        self.is_constructed.set()
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
            self._end(session, call, refusal(f"{self._request.class_path} has no endpoint {call.endpoint!r}"))
        elif declared.is_async:
            self._defer(functools.partial(self._start_async, session, call, frames, declared))
        else:
            self._running[session, call.id] = None
            self._work.put(lambda: self._run_sync(session, call, frames, declared))

    def _start_async(self, session: Session, call: Call, frames: Sequence[Any], declared: Endpoint[..., Any]) -> None:
        """Run the endpoint at once up to its first wait: most never wait, and a turn of the loop costs a message."""
        running = self._run_async(session, call, frames, declared)
        task = start_now(self.loop, running, self._context.copy(), declared.name)
        if not task.done():
            self._running[session, call.id] = task

    async def _run_async(
        self, session: Session, call: Call, frames: Sequence[Any], declared: Endpoint[..., Any]
    ) -> None:
        answer: Payload | ErrorNote
        try:
            args, kwargs = unpack(declared.signature, call, frames, session.peer)
            if call.deadline_s is None:
                value = await declared.method(self._actor, *args, **kwargs)
            else:
                context.enter(self, call.deadline_s)
                value = await self._within(declared.method(self._actor, *args, **kwargs), call.deadline_s)
            answer = pack_result(declared, value, call, self._limits)
        except BaseException as error:
            # Whatever an endpoint raises is its caller's to see, also what is no Exception: torch has one, a panic in Rust, `sys.exit`.
            answer = note_from_error(error)
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

    def _run_sync(self, session: Session, call: Call, frames: Sequence[Any], declared: Endpoint[..., Any]) -> None:
        if (session, call.id) not in self._running:
            self._end(session, call, note_from_error(asyncio.CancelledError()))
            return
        context.enter(self, call.deadline_s)
        answer: Payload | ErrorNote
        try:
            args, kwargs = unpack(declared.signature, call, frames, session.peer)
            answer = pack_result(declared, declared.method(self._actor, *args, **kwargs), call, self._limits)
        except BaseException as error:
            # As above; and this thread goes on to the next call.
            answer = note_from_error(error)
        self._end(session, call, answer)

    def _end(self, session: Session, call: Call, answer: Payload | ErrorNote) -> None:
        if self._running:
            self._running.pop((session, call.id), None)
        session.answer(call, answer)
        if call.oneway and isinstance(answer, ErrorNote):
            self._hosting.report("exception", f"{self.name}.{call.endpoint}", answer)

    def cancel(self, session: Session, call_id: int) -> None:
        """Cancel an async call's task; drop a sync call that has not started. A sync call that runs goes on to its end."""
        task = self._running.get((session, call_id))
        if task is not None:
            task.cancel()
        else:
            self._running.pop((session, call_id), None)

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

    async def stop(self) -> None:
        """Cancel what runs, call `__cleanup__`, end the thread."""
        for key in list(self._running):
            self.cancel(*key)
        if self._actor is not None:
            actor, self._actor = self._actor, None
            try:
                context.enter(self, None)
                cleaned: Any = actor.__cleanup__(None)
                if inspect.isawaitable(cleaned):
                    await cleaned
            except Exception:
                # The end goes on; the log says what was not cleaned up.
                logger.exception("%s.__cleanup__ failed", self.name)
        self._error = self._error or refusal(f"actor {self.name} has been stopped")
        self._work.put(None)


class Hosting:
    """The actors of this process, and the system calls that start and end them."""

    def __init__(self, node: Node, loop: asyncio.AbstractEventLoop) -> None:
        self.node = node
        self.loop = loop
        self._hosts: dict[str, ActorHost] = {}
        self._expected: dict[str, list[_Early]] = {}
        node.inbox.calls = self

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
        session.answer(call, refusal(reason))
        if call.oneway:
            logger.error("refused a broadcast from %s: %s", session.peer, reason)

    def on_cancel(self, session: Session, call_id: int) -> None:
        """Cancel a call wherever it runs. After the starts of the same round: the call may be among them."""
        for host in self._hosts.values():
            self.node.reactor.defer(functools.partial(host.cancel, session, call_id))

    def _system_call(self, session: Session, call: Call, frames: Sequence[Any]) -> None:
        try:
            if call.endpoint == "spawn":
                request = SPAWN.unpack(call.args, frames, call.blobs)[0]
                self._spawn(request, lambda error: session.answer(call, error or _NOTHING))
            elif call.endpoint == "stop":
                self._stop(session, call, STOP.unpack(call.args, frames, call.blobs)[0])
            elif call.endpoint == "stacks":
                session.answer(call, pack((own_stacks(),)))
            else:
                self._refuse(session, call, f"no system call {call.endpoint!r}")
        except WireError as error:
            self._refuse(session, call, str(error))

    def _spawn(self, request: SpawnRequest, on_done: OnConstructed) -> None:
        host = self._hosts[request.actor_id] = ActorHost(self, request)
        for early in self._expected.pop(request.actor_id, []):
            host.accept(*early)
        host.construct(on_done)

    def revive(self, request: SpawnRequest) -> None:
        """Construct an actor this process had before it was restarted."""

        def on_done(error: ErrorNote | None) -> None:
            if error is not None:
                self.report("constructor", request.name, error)

        self._spawn(request, on_done)

    def report(self, cause: str, where: str, error: ErrorNote) -> None:
        """Tell the owner of this process of an error that ends no awaited call."""
        detail = f"{where}: {error.type_name}: {error.text}"
        logger.error("%s\n%s", detail, error.traceback)
        self.node.report(FailureNote.of(self.node.me, cause, detail, error.traceback))

    def _stop(self, session: Session, call: Call, actor_id: str) -> None:
        host = self._hosts.get(actor_id)

        async def stop() -> None:
            if host is not None:
                await host.is_constructed.wait()
                await host.stop()
            session.answer(call, _NOTHING)

        self._stopping = self.loop.create_task(stop())

    async def stop(self) -> None:
        """Stop every actor, the youngest first."""
        for host in reversed(list(self._hosts.values())):
            await host.stop()

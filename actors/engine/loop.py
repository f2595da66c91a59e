"""The stepping thread: the only one that touches the engine. Knows nothing of vLLM; `Core` is what it needs of it.

    other threads ──submit, call, hold, release──▶ inbox ──┐
                                                           ▼  between steps
    Ticket.done ◀── finished groups ── step ◀── step ◀── commands, new requests

Rests on the inbox while nothing is in flight. While it is *held* (for new weights) it steps only to drain, and what is
submitted waits in the backlog. An exception in a step ends the loop: every waiting group and command fails with it, and so
does whatever comes later. Nobody hangs.
"""

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from actors.engine.completions import Completion, Sampled, Ticket
from vtriune.runtime import report_step

T = TypeVar("T")


class EngineError(RuntimeError):
    """A request the engine refuses, or the engine's end; says what and why."""


class EngineBroken(EngineError):
    """Raised by a command after which the engine must not go on: its weights are in no defined state."""

    kind = "engine"


class EngineStopped(EngineError):
    """The loop has ended, with the error that the text repeats; it takes nothing any more."""

    kind = "engine"


class Core(Protocol):
    """The engine as the loop uses it."""

    def add(self, request_id: str, template: Any, index: int) -> None:
        """Queue completion `index` of the template's prompt, at the engine's current version."""

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests: running, waiting, or ended in the step just made."""

    def step(self) -> list[Sampled]:
        """Sample one token of each running request."""


class StepLoop:
    """Drives `core` from its own thread, from `start` to `close`."""

    def __init__(self, core: Core, version: int = 0) -> None:
        self._core = core
        self.version = version
        """What the next step's tokens are sampled under; changed by a command, in the loop's thread."""
        self._inbox: queue.SimpleQueue[tuple[Callable[[], None], Future[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._closing = threading.Event()
        self._flying: dict[str, tuple[Ticket, Completion]] = {}
        self._backlog: list[tuple[Ticket, Completion]] = []
        self._held: Future[None] | None = None
        self._request_numbers = itertools.count()
        self._paused_since: float | None = None
        self.pace = Pace()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread; groups in flight fail. Idempotent."""
        self._post(self._closing.set, _promise())
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def submit(self, template: Any, num_completions: int, first: int = 0) -> Ticket:
        """Sample completions `first`, `first` + 1, … of a group; `done` of the result holds them, or the error that ended the
        loop."""
        ticket = Ticket(template, [Completion(first + index) for index in range(num_completions)], _promise())
        self._post(lambda: self._admit(ticket), ticket.done)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drop a group, wherever it is; its `done` is never resolved."""
        self._post(lambda: self._drop(ticket), _promise())

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` between steps, in the loop's thread."""
        future: Future[T] = _promise()

        def run() -> None:
            try:
                future.set_result(function())
            except EngineBroken as error:
                future.set_exception(error)
                raise
            except Exception as error:
                # For the caller to handle: the engine itself is as before.
                future.set_exception(error)

        self._post(run, future)
        return future

    def hold(self, *, drain: bool) -> "Future[None]":
        """Stop sampling. Resolved once nothing runs (`drain`) or at once; requests without a token yet are taken back."""
        future: Future[None] = _promise()

        def begin() -> None:
            self._held = future
            self._withdraw_unstarted()
            if not drain or not self._flying:
                self._stand_still()

        self._post(begin, future)
        return future

    def release(self) -> "Future[float]":
        """Sample again, the backlog included; the result is the time without sampling, in seconds."""
        return self.call(self._go_on)

    @property
    def num_running(self) -> int:
        """Completions the engine holds."""
        return len(self._flying)

    @property
    def num_waiting(self) -> int:
        """Completions held back while weights change."""
        return len(self._backlog)

    def _post(self, command: Callable[[], None], future: "Future[Any]") -> None:
        """Have the loop run `command`; once it has ended, `future` gets the error instead."""
        with self._lock:
            if self._error is None:
                self._inbox.put((command, future))
                return
        future.set_exception(self._refusal())

    def _refusal(self) -> EngineStopped:
        return EngineStopped(f"the engine has stopped: {type(self._error).__name__}: {self._error}")

    def _main(self) -> None:
        try:
            while not self._closing.is_set():
                self._run_commands()
                if self._flying and self._paused_since is None:
                    self._step()
            self._end(EngineError("the engine was closed"))
        except BaseException as error:
            # Whatever ended the loop, those who wait for it must hear of it.
            self._end(error)

    def _run_commands(self) -> None:
        """All that came; waits for one when there is nothing to step."""
        is_idle = not self._flying or self._paused_since is not None
        with contextlib.suppress(queue.Empty):
            command, _ = self._inbox.get(block=is_idle)
            while True:
                command()
                if self._closing.is_set():
                    return
                command, _ = self._inbox.get_nowait()

    def _step(self) -> None:
        start = time.perf_counter()
        num_tokens = 0
        for sampled in self._core.step():
            flight = self._flying.get(sampled.request_id)
            if flight is None:
                continue
            ticket, completion = flight
            completion.extend(sampled, self.version)
            num_tokens += len(sampled.token_ids)
            if sampled.finish is not None:
                self._finish(ticket, completion, sampled.finish)
        self.pace.count(num_tokens, time.perf_counter() - start)
        if num_tokens:
            report_step("sampling", f"{len(self._flying)} completions in flight")
        if self._held is not None and not self._flying:
            self._stand_still()

    def _finish(self, ticket: Ticket, completion: Completion, finish: str) -> None:
        del self._flying[completion.request_id]
        if finish not in ("stop", "length"):
            _fail(ticket.done, EngineError(f"the engine ended a completion with reason {finish!r}"))
            self._drop(ticket)
            return
        completion.finish = "stop" if finish == "stop" else "length"
        ticket.num_open -= 1
        if not ticket.num_open:
            ticket.done.set_result(ticket.completions)

    def _admit(self, ticket: Ticket) -> None:
        for completion in ticket.completions:
            self._start_one(ticket, completion)

    def _start_one(self, ticket: Ticket, completion: Completion) -> None:
        if self._held is not None:
            self._backlog.append((ticket, completion))
            return
        completion.request_id = f"{next(self._request_numbers)}"
        self._flying[completion.request_id] = (ticket, completion)
        try:
            self._core.add(completion.request_id, ticket.template, completion.index)
        except ValueError as error:
            # vLLM refuses a request by ValueError; the group fails, the engine goes on.
            del self._flying[completion.request_id]
            _fail(ticket.done, EngineError(f"the engine refused a request: {error}"))
            self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        ticket.is_cancelled = True
        self._backlog = [flight for flight in self._backlog if flight[0] is not ticket]
        ids = [request_id for request_id, flight in self._flying.items() if flight[0] is ticket]
        for request_id in ids:
            del self._flying[request_id]
        if ids:
            self._core.abort(ids)

    def _withdraw_unstarted(self) -> None:
        """A request without a token yet starts anew after the change, under the new version from its first token."""
        unstarted = [flight for flight in self._flying.values() if not flight[1].token_ids]
        for _, completion in unstarted:
            del self._flying[completion.request_id]
        if unstarted:
            self._core.abort([completion.request_id for _, completion in unstarted])
        self._backlog = unstarted + self._backlog

    def _stand_still(self) -> None:
        self._paused_since = time.perf_counter()
        if self._held is not None and not self._held.done():
            self._held.set_result(None)

    def _go_on(self) -> float:
        _fail(self._held, EngineError("released before everything in flight had ended"))
        paused_s = 0.0 if self._paused_since is None else time.perf_counter() - self._paused_since
        self._held, self._paused_since = None, None
        backlog, self._backlog = self._backlog, []
        for ticket, completion in backlog:
            if not ticket.is_cancelled:
                self._start_one(ticket, completion)
        return paused_s

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
        for ticket, _ in (*self._flying.values(), *self._backlog):
            _fail(ticket.done, self._refusal())
        _fail(self._held, self._refusal())
        with contextlib.suppress(queue.Empty):
            while True:
                _fail(self._inbox.get_nowait()[1], self._refusal())


def _promise() -> "Future[Any]":
    """A future that only the loop settles: running from the start, so that no waiter can cancel it under the loop."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _fail(future: "Future[Any] | None", error: EngineError) -> None:
    """Give it to whoever still waits for `future`."""
    if future is not None and not future.done():
        future.set_exception(error)


class Pace:
    """What the loop did since the last reading. Written by the loop's thread, read by any."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._num_tokens, self._num_steps, self._busy_s = 0, 0, 0.0

    def count(self, num_tokens: int, seconds: float) -> None:
        """One step."""
        self._num_tokens += num_tokens
        self._num_steps += 1
        self._busy_s += seconds

    def read(self) -> dict[str, float]:
        """Shares of the time and rates since the last reading."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        figures = {
            "idle_share": max(1.0 - self._busy_s / elapsed, 0.0),
            "tokens_per_s": self._num_tokens / elapsed,
        }
        if self._num_steps:
            figures["tokens_per_step"] = self._num_tokens / self._num_steps
        self._since, self._num_tokens, self._num_steps, self._busy_s = now, 0, 0, 0.0
        return figures

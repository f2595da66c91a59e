"""The stepping thread over a handwritten core: what is stepped, counted, withdrawn, drained, and who hears of an error."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.completions import Completion, Sampled
from actors.engine.loop import EngineBroken, EngineError, StepLoop
from vtriune.messages import VersionSpan

WAIT_S = 10.0


class FakeCore:
    """Completions of `template` tokens; a step samples one token of each of at most `room` requests."""

    def __init__(self, room: int = 8) -> None:
        self.room = room
        self.left: dict[str, int] = {}
        self.added: list[tuple[str, int]] = []
        self.aborted: list[str] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.finish = "length"
        self.error: BaseException | None = None
        self.refuses = False

    def add(self, request_id: str, template: Any, index: int) -> None:
        self.threads.add(threading.get_ident())
        if self.refuses:
            raise ValueError("no room for this prompt")
        self.left[request_id] = template
        self.added.append((request_id, index))

    def abort(self, request_ids: Sequence[str]) -> None:
        self.threads.add(threading.get_ident())
        self.aborted += request_ids
        for request_id in request_ids:
            self.left.pop(request_id, None)

    def step(self) -> list[Sampled]:
        self.threads.add(threading.get_ident())
        self.gate.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        sampled = []
        for request_id in list(self.left)[: self.room]:
            self.left[request_id] -= 1
            ended = self.left[request_id] == 0
            if ended:
                del self.left[request_id]
            sampled.append(Sampled(request_id, [7], [-0.5], self.finish if ended else None))
        time.sleep(0.001)
        return sampled


@pytest.fixture
def core() -> FakeCore:
    return FakeCore()


@pytest.fixture
def loop(core: FakeCore) -> Iterator[StepLoop]:
    loop = StepLoop(core)
    loop.start()
    yield loop
    core.gate.set()
    loop.close()
    assert not any(thread.name == "engine" for thread in threading.enumerate())


def spans(completions: Sequence[Completion]) -> list[list[tuple[int, int]]]:
    return [c.spans for c in completions]


def change(loop: StepLoop, core: FakeCore, version: int, *, drain: bool = False) -> None:
    """What the engine does at a publish."""
    loop.hold(drain=drain).result(WAIT_S)
    loop.call(lambda: setattr(loop, "version", version)).result(WAIT_S)
    loop.release().result(WAIT_S)


def test_a_group_ends_when_its_last_completion_does_and_only_the_loops_thread_touches_the_core(
    loop: StepLoop, core: FakeCore
) -> None:
    completions = loop.submit(3, 2).done.result(WAIT_S)
    assert [(c.index, c.token_ids, c.logprobs, c.finish) for c in completions] == [
        (index, [7, 7, 7], [-0.5] * 3, "length") for index in range(2)
    ]
    assert spans(completions) == [[(0, 3)], [(0, 3)]]
    assert core.threads == {thread.ident for thread in threading.enumerate() if thread.name == "engine"}


def test_tokens_are_told_as_steps_and_a_step_of_the_engine_without_any_is_none(
    loop: StepLoop, core: FakeCore, told: list[tuple[str, str]]
) -> None:
    loop.submit(5, 2).done.result(WAIT_S)
    assert [step for work, step in told if work == "sampling"] == ["2 completions in flight"] * 4 + [
        "0 completions in flight"
    ]
    core.room = 0
    waiting = loop.submit(5, 1)
    time.sleep(0.05)
    assert len(told) == 5
    loop.cancel(waiting)


def test_nothing_is_stepped_while_nothing_is_in_flight(loop: StepLoop, core: FakeCore) -> None:
    loop.submit(2, 1).done.result(WAIT_S)
    steps = loop.pace.read()["tokens_per_step"]
    time.sleep(0.05)
    assert steps == 1
    figures = loop.pace.read()
    assert figures["idle_share"] == 1
    assert "tokens_per_step" not in figures, "a mean over no step"


def test_tokens_sampled_after_a_change_carry_the_new_version(loop: StepLoop, core: FakeCore) -> None:
    ticket = loop.submit(400, 2)
    time.sleep(0.05)
    change(loop, core, 1)
    for of_one in spans(ticket.done.result(WAIT_S)):
        (zero, num_zero), (one, num_one) = of_one
        assert (zero, one) == (0, 1)
        assert num_zero > 0
        assert num_zero + num_one == 400


def test_requests_without_a_token_are_taken_back_and_start_under_the_new_version(
    loop: StepLoop, core: FakeCore
) -> None:
    core.room = 2
    tickets = [loop.submit(60, 2) for _ in range(3)]
    time.sleep(0.02)
    change(loop, core, 5)
    first, *others = [spans(ticket.done.result(WAIT_S)) for ticket in tickets]
    assert all(len(of_one) == 2 for of_one in first)
    assert others == [[[(5, 60)], [(5, 60)]]] * 2
    assert len(core.aborted) == 4
    assert len(core.added) == 6 + 4


def test_a_drain_ends_what_has_begun_and_holds_back_what_has_not(loop: StepLoop, core: FakeCore) -> None:
    core.room = 2
    started, waiting = loop.submit(50, 2), loop.submit(10, 2)
    time.sleep(0.02)
    held = loop.hold(drain=True)
    late = loop.submit(10, 1)
    held.result(WAIT_S)
    assert started.done.done()
    assert (loop.num_running, loop.num_waiting) == (0, 3)
    loop.call(lambda: setattr(loop, "version", 1)).result(WAIT_S)
    loop.release().result(WAIT_S)
    assert spans(started.done.result(WAIT_S)) == [[(0, 50)]] * 2
    assert spans([*waiting.done.result(WAIT_S), *late.done.result(WAIT_S)]) == [[(1, 10)]] * 3


def test_while_held_nothing_is_sampled_and_the_pause_is_measured(loop: StepLoop, core: FakeCore) -> None:
    ticket = loop.submit(10_000, 1)
    time.sleep(0.02)
    loop.hold(drain=False).result(WAIT_S)
    before = loop.call(lambda: len(ticket.completions[0].token_ids)).result(WAIT_S)
    time.sleep(0.05)
    assert loop.call(lambda: len(ticket.completions[0].token_ids)).result(WAIT_S) == before
    assert 0.05 <= loop.release().result(WAIT_S) < 1
    loop.cancel(ticket)


def test_a_release_before_the_drain_has_ended_fails_the_hold_and_samples_on(loop: StepLoop, core: FakeCore) -> None:
    ticket = loop.submit(200, 1)
    time.sleep(0.01)
    held = loop.hold(drain=True)
    loop.release().result(WAIT_S)
    with pytest.raises(EngineError, match="released before"):
        held.result(WAIT_S)
    assert spans(ticket.done.result(WAIT_S)) == [[(0, 200)]]


def test_an_exception_in_a_step_reaches_every_waiter_and_every_later_one(loop: StepLoop, core: FakeCore) -> None:
    core.gate.clear()
    waiters: list[Future[Any]] = [loop.submit(10, 2).done, loop.submit(10, 1).done]
    time.sleep(0.02)
    core.error = ZeroDivisionError("a kernel divided by zero")
    waiters += [loop.submit(10, 1).done, loop.call(lambda: None), loop.hold(drain=True), loop.release()]
    core.gate.set()
    for waiter in waiters:
        with pytest.raises(EngineError, match="the engine has stopped: ZeroDivisionError: a kernel divided by zero"):
            waiter.result(WAIT_S)
    for late in (loop.submit(1, 1).done, loop.call(lambda: 1), loop.hold(drain=False), loop.release()):
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            late.result(WAIT_S)


def test_a_command_that_raises_is_its_callers_affair_unless_it_breaks_the_engine(
    loop: StepLoop, core: FakeCore
) -> None:
    def fails() -> None:
        raise KeyError("no such thing")

    def breaks() -> None:
        raise EngineBroken("half the weights are loaded")

    with pytest.raises(KeyError):
        loop.call(fails).result(WAIT_S)
    loop.submit(2, 1).done.result(WAIT_S)
    with pytest.raises(EngineBroken):
        loop.call(breaks).result(WAIT_S)
    with pytest.raises(EngineError, match="half the weights"):
        loop.submit(2, 1).done.result(WAIT_S)


def test_a_cancelled_group_frees_the_engine_and_is_not_taken_up_after_a_hold(loop: StepLoop, core: FakeCore) -> None:
    doomed = loop.submit(100_000, 3)
    time.sleep(0.01)
    loop.cancel(doomed)
    assert loop.call(lambda: len(core.left)).result(WAIT_S) == 0
    held_back = loop.hold(drain=False).result(WAIT_S) or loop.submit(5, 2)
    loop.cancel(held_back)
    loop.release().result(WAIT_S)
    assert loop.call(lambda: (len(core.left), loop.num_waiting)).result(WAIT_S) == (0, 0)
    with pytest.raises(Late):
        doomed.done.result(0.01)


def test_a_request_the_core_refuses_fails_its_group_alone(loop: StepLoop, core: FakeCore) -> None:
    core.refuses = True
    with pytest.raises(EngineError, match="no room for this prompt"):
        loop.submit(5, 2).done.result(WAIT_S)
    core.refuses = False
    assert len(loop.submit(5, 2).done.result(WAIT_S)) == 2


def test_a_finish_reason_of_the_engines_own_is_an_error_not_a_short_answer(loop: StepLoop, core: FakeCore) -> None:
    core.finish = "error"
    with pytest.raises(EngineError, match="reason 'error'"):
        loop.submit(5, 2).done.result(WAIT_S)


def test_closing_fails_what_is_in_flight(core: FakeCore) -> None:
    loop = StepLoop(core)
    loop.start()
    ticket = loop.submit(100_000, 1)
    time.sleep(0.01)
    loop.close()
    with pytest.raises(EngineError, match="closed"):
        ticket.done.result(WAIT_S)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=30))
def test_spans_sum_to_the_tokens_and_merge_equal_neighbours(steps: list[tuple[int, int]]) -> None:
    completion = Completion(0)
    for version, num_tokens in steps:
        completion.extend(Sampled("r", [1] * num_tokens, [0.0] * num_tokens, None), version)
    made = [VersionSpan(*span) for span in completion.spans]
    assert sum(span.num_tokens for span in made) == len(completion.token_ids) == sum(number for _, number in steps)
    assert all(a.version != b.version for a, b in itertools.pairwise(made))
    expected = [version for version, number in steps for _ in range(number)]
    assert [span.version for span in made for _ in range(span.num_tokens)] == expected

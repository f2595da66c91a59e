"""Calls between a root process and local actors: every way to call, every kind of answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from tests.runtime.actors import Echo, Faulty, Fragile, Group, Relay
from vtriune.runtime import (
    ActorError,
    DeadlineExceeded,
    MeshFailure,
    MessageRefused,
    ProcMesh,
    current_rank,
    this_host,
)

WAIT_S = 30.0


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    mesh = this_host().spawn_procs(per_host={"procs": 2}, name="calls", on_failure=print)
    yield mesh
    mesh.stop().get(timeout=WAIT_S)


@pytest.fixture(scope="module")
def echo(procs: ProcMesh) -> Echo:
    return procs.spawn("echo", Echo, "hello")


def test_call_reaches_every_rank_and_returns_a_value_mesh(echo: Echo) -> None:
    values = echo.where.call().get(timeout=WAIT_S)
    assert [(point.rank, value[0], value[1]) for point, value in values.items()] == [
        (0, 0, {"procs": 0}),
        (1, 1, {"procs": 1}),
    ]
    assert len({value[2] for value in values.values()} | {os.getpid()}) == 3


def test_call_one_needs_a_mesh_of_one(echo: Echo) -> None:
    assert echo.slice(procs=1).greet.call_one("x").get(timeout=WAIT_S) == "hello x"
    with pytest.raises(ValueError, match="slice it"):
        echo.greet.call_one("x")


def test_choose_goes_to_the_rank_with_the_least_outstanding(echo: Echo) -> None:
    echo.marks.call().get(timeout=WAIT_S)
    naps = [echo.slice(procs=0).nap.call_one(0.6) for _ in range(4)]
    chosen = [echo.where.choose() for _ in range(3)]
    assert {future.get(timeout=WAIT_S)[0] for future in chosen} == {1}
    assert [nap.get(timeout=WAIT_S) for nap in naps] == ["rested"] * 4


def test_stream_yields_replies_as_they_arrive(echo: Echo) -> None:
    assert sorted(future.get()[0] for future in echo.where.stream()) == [0, 1]

    async def collect() -> list[int]:
        return [value[0] async for value in echo.where.stream()]

    assert sorted(asyncio.run(collect())) == [0, 1]


def test_broadcasts_run_in_order_and_before_later_calls(procs: ProcMesh) -> None:
    notes = procs.spawn("notes", Echo)
    for mark in range(300):
        notes.note.broadcast(mark)
    assert notes.marks.call().get(timeout=WAIT_S).to_list() == [list(range(300))] * 2


def test_futures_work_from_asyncio_and_async_endpoints_run_concurrently(echo: Echo) -> None:
    async def many() -> float:
        one = echo.slice(procs=0)
        await one.ping.call_one(0)
        start = time.perf_counter()
        assert await asyncio.gather(*[one.nap.call_one(0.2) for _ in range(50)]) == ["rested"] * 50
        return time.perf_counter() - start

    assert asyncio.run(many()) < 3.0


def test_sync_endpoints_run_one_at_a_time_in_order_while_the_loop_stays_live(procs: ProcMesh) -> None:
    one = procs.slice(procs=0).spawn("worker", Echo)
    blocking = [one.block.call_one(0.1, mark=i) for i in range(5)]
    start = time.perf_counter()
    assert one.ping.call_one(7).get(timeout=WAIT_S) == 7
    assert time.perf_counter() - start < 0.4
    assert {future.get(timeout=WAIT_S) for future in blocking} == {"actor-worker"}
    assert one.marks.call_one().get(timeout=WAIT_S) == [0, 1, 2, 3, 4]


def test_arrays_and_structs_arrive_as_they_were(echo: Echo) -> None:
    rng = np.random.default_rng(0)
    group = Group(
        "g",
        [rng.integers(0, 100, 5).astype(np.int32), rng.integers(0, 100, 50_000).astype(np.int32)[::2]],
        rng.random(70_000, dtype=np.float32),
    )
    back = echo.slice(procs=0).mirror.call_one(group).get(timeout=WAIT_S)
    assert (back.name, back.note) == ("g", None)
    for sent, received in zip([*group.tokens, group.rewards], [*back.tokens, back.rewards], strict=True):
        np.testing.assert_array_equal(sent, received)
        assert sent.dtype == received.dtype
    assert echo.sink.choose(b"x" * 1_000_000).get(timeout=WAIT_S) == 1_000_000


def test_a_misfit_is_refused_at_the_sender_by_name(echo: Echo) -> None:
    for call in (
        lambda: echo.ping.call("not a number"),
        lambda: echo.ping.call(),
        lambda: echo.ping.call(1, 2),
        lambda: echo.ping.call(y=1),
        lambda: echo.sink.call(object()),
    ):
        with pytest.raises(TypeError, match=r"echo\.(ping|sink)"):
            call()
    with pytest.raises(TypeError, match=r"echo\.ping: x: Expected `int`, got `str`"):
        echo.ping.call("1")
    with pytest.raises(AttributeError, match="no endpoint 'grete'"):
        echo.grete.call("x")  # type: ignore[attr-defined]


def test_a_misfit_inside_a_struct_is_refused_by_the_receiver_and_the_connection_survives(echo: Echo) -> None:
    one = echo.slice(procs=0)
    wrong_field = Group(5, [], np.zeros(2, np.float32))  # type: ignore[arg-type]
    named = r"echo\.mirror at calls rank 0 .*sent by root rank 0 .*pid \d+\): group\.name: Expected `str`, got `int`"
    with pytest.raises(MessageRefused, match=named):
        one.mirror.call_one(wrong_field).get(timeout=WAIT_S)
    wrong_dtype = Group("g", [], np.zeros(2, np.float64))
    with pytest.raises(MessageRefused, match="expected an array of float32, got float64"):
        one.mirror.call_one(wrong_dtype).get(timeout=WAIT_S)
    assert one.ping.call_one(3).get(timeout=WAIT_S) == 3


def test_a_remote_exception_arrives_with_its_traceback(echo: Echo) -> None:
    with pytest.raises(ActorError) as caught:
        echo.slice(procs=1).fail.call_one("out of cheese").get(timeout=WAIT_S)
    error = caught.value
    assert error.type_name == "builtins.ValueError"
    assert error.text == "out of cheese"
    assert "echo.fail at calls rank 1" in str(error)
    assert "raise ValueError(text)" in str(error)


@pytest.fixture(scope="module")
def faulty(procs: ProcMesh) -> Faulty:
    return procs.spawn("faulty", Faulty)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("ValueError", "lease"),
        ("OtherUse", "lease"),
        ("Fatal", "fatal"),
        ("RenamedFatal", "fatal"),
        ("BrokenEngine", "engine"),
        ("Elsewhere", "bystander"),
        ("ValueError from RenamedFatal", "fatal"),
        ("Elsewhere from Fatal", "bystander"),
        ("ValueError from itself", "lease"),
        ("group of Elsewhere ValueError", "lease"),
        ("group of ValueError RenamedFatal BrokenEngine", "fatal"),
    ],
)
def test_an_error_arrives_with_the_kind_that_it_its_bases_or_its_causes_declare(
    faulty: Faulty, how: str, kind: str
) -> None:
    error = faulty.slice(procs=0).fail.call_one(how).exception(WAIT_S)
    assert getattr(error, "kind", None) == kind


@pytest.mark.parametrize(
    ("how", "kind"),
    [("RenamedFatal", "fatal"), ("BrokenEngine", "lease"), ("Elsewhere", "lease"), ("ValueError", "lease")],
)
def test_what_ends_the_run_passes_through_other_actors_and_what_speaks_of_its_raiser_does_not(
    faulty: Faulty, how: str, kind: str
) -> None:
    near, far = faulty.slice(procs=0), faulty.slice(procs=1)
    errors = [call.call_one(far, how).exception(WAIT_S) for call in (near.ask, near.ask_and_wrap)]
    assert [getattr(error, "kind", None) for error in errors] == [kind, kind]


@pytest.mark.parametrize("how", ["Mute", "Garbled"])
def test_an_exception_whose_text_cannot_be_made_or_encoded_still_ends_the_call(faulty: Faulty, how: str) -> None:
    call = faulty.slice(procs=0).fail.call_one(how)
    with contextlib.suppress(TimeoutError):
        call.exception(timeout=5.0)
    assert call.done()
    error = call.exception()
    assert isinstance(error, ActorError)
    assert error.type_name == f"tests.runtime.actors.{how}"


@pytest.mark.parametrize("how", ["NoException", "SystemExit"])
def test_what_is_raised_and_is_no_exception_ends_its_call_and_no_other(procs: ProcMesh, how: str) -> None:
    faulty = procs.spawn("faulty", Faulty).slice(procs=0)
    born = procs.spawn("born", Faulty, how).slice(procs=0)
    calls = [fail.call_one(how) for fail in (faulty.fail, faulty.fail_on_its_thread)]
    calls += [faulty.fail_on_its_thread.call_one("ValueError"), born.initialized]
    for call in calls:
        with contextlib.suppress(TimeoutError):
            call.exception(timeout=2.0)
    assert [isinstance(call.done() and call.exception(), ActorError) for call in calls] == [True] * 4


def test_a_failing_constructor_fails_its_calls_with_the_constructors_traceback(procs: ProcMesh) -> None:
    fragile = procs.spawn("fragile", Fragile, "no model here")
    with pytest.raises(ActorError, match="no model here"):
        fragile.ping.call().get(timeout=WAIT_S)
    with pytest.raises(ActorError, match="no model here"):
        fragile.initialized.get(timeout=WAIT_S)


def test_actors_call_actors_they_were_given(procs: ProcMesh, echo: Echo) -> None:
    relay = procs.slice(procs=1).spawn("relay", Relay, echo, echo)
    assert relay.ask.call_one("a").get(timeout=WAIT_S) == "hello a"
    assert relay.ask_blocking.call_one("b").get(timeout=WAIT_S) == ["hello b", "hello b"]
    assert relay.ask_untyped.call_one("c").get(timeout=WAIT_S) == "hello c"
    notes = procs.spawn("notes", Echo)
    relay.tell.call_one(notes, 9).get(timeout=WAIT_S)
    end = time.monotonic() + WAIT_S
    while notes.marks.call().get(timeout=WAIT_S).to_list() != [[9], [9]]:
        assert time.monotonic() < end


def test_a_deadline_fails_the_call_and_cancels_the_callee(echo: Echo) -> None:
    one = echo.slice(procs=0)
    start = time.perf_counter()
    with pytest.raises(DeadlineExceeded, match=r"echo\.nap"):
        one.nap.within(0.3).call_one(60.0).get(timeout=WAIT_S)
    assert time.perf_counter() - start < 5.0
    assert one.ping.call_one(1).get(timeout=WAIT_S) == 1


def test_get_times_out_and_the_call_goes_on(echo: Echo) -> None:
    future = echo.slice(procs=0).nap.call_one(0.5)
    with pytest.raises(TimeoutError, match=r"echo\.nap at calls rank 0"):
        future.get(timeout=0.05)
    assert future.get(timeout=WAIT_S) == "rested"


def test_blocking_in_asyncio_code_is_an_error_that_says_what_to_do(echo: Echo) -> None:
    async def block() -> None:
        echo.nap.call(0.1).get()

    with pytest.raises(RuntimeError, match="await"):
        asyncio.run(block())


def test_many_threads_may_call_at_once(echo: Echo) -> None:
    results: list[int] = []

    def work(base: int) -> None:
        results.extend(echo.ping.choose(base + i).get(timeout=WAIT_S) for i in range(100))

    threads = [threading.Thread(target=work, args=(base,)) for base in range(0, 800, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(800))


def test_the_root_process_has_no_rank() -> None:
    with pytest.raises(RuntimeError, match="inside an actor"):
        current_rank()


def test_a_stopped_mesh_fails_calls_and_stops_again_without_complaint() -> None:
    procs = this_host().spawn_procs(name="brief")
    echo = procs.spawn("echo", Echo)
    pid = echo.where.call_one().get(timeout=WAIT_S)[2]
    procs.stop().get(timeout=WAIT_S)
    procs.stop().get(timeout=WAIT_S)
    assert not os.path.exists(f"/proc/{pid}")
    with pytest.raises(MeshFailure, match="has been stopped"):
        echo.ping.call_one(1).get(timeout=WAIT_S)

"""Meshes with named dimensions: of hosts, of processes, of actors, and the values that come back from them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.actors import Echo, Hasty, Namer, Tidy, TidyAfterAWhile, TidyAtOnce
from vtriune.runtime import Extent, HostMesh, MessageRefused, ProcMesh, RestartPolicy, this_host
from vtriune.runtime.node import this_node

WAIT_S = 30.0


@pytest.fixture(scope="module")
def procs() -> Iterator[ProcMesh]:
    mesh = this_host().spawn_procs(per_host={"rows": 2, "cols": 2}, name="grid", on_failure=print)
    yield mesh
    mesh.stop().get(timeout=WAIT_S)


@pytest.fixture(scope="module")
def namer(procs: ProcMesh) -> Namer:
    return procs.spawn("namer", Namer)


def test_host_meshes_have_dimensions_that_processes_are_added_to() -> None:
    hosts = HostMesh(Extent(["racks", "hosts"], [2, 3]), [f"host{i}" for i in range(6)])
    assert (hosts.size(), hosts.size("hosts"), hosts.sizes) == (6, 3, {"racks": 2, "hosts": 3})
    assert hosts.slice(racks=1).sizes == {"hosts": 3}
    assert hosts.flatten("all").sizes == {"all": 6}
    assert [len(one) for one in hosts] == [1] * 6
    assert (len(this_host()), this_host().sizes) == (1, {})


def test_process_meshes_slice_flatten_iterate_and_tell_their_size(procs: ProcMesh) -> None:
    assert (procs.size(), procs.size(["rows", "cols"]), procs.size("rows"), len(procs)) == (4, 4, 2, 4)
    assert procs.slice(rows=1).peers == procs.peers[2:]
    assert procs.slice(cols=slice(1, 2)).sizes == {"rows": 2, "cols": 1}
    assert procs.flatten("gpus").rename(gpus="devices").sizes == {"devices": 4}
    assert procs.flatten("all").split(all=("a", "b"), b=2).sizes == {"a": 2, "b": 2}
    assert [one.peers for one in procs] == [(peer,) for peer in procs.peers]
    assert [peer.rank for peer in procs.peers] == [0, 1, 2, 3]


def test_actor_meshes_are_addressed_like_the_processes_they_run_on(namer: Namer) -> None:
    sizes = {"rows": 2, "cols": 2}
    assert (namer.sizes, namer.size(), len(namer)) == (sizes, 4, 4)
    assert namer.slice(rows=1, cols=0).place.call_one().get(timeout=WAIT_S) == (
        2,
        {"rows": 1, "cols": 0},
        sizes,
        "namer",
    )
    assert namer.slice(cols=1).flatten("all").place.call().get(timeout=WAIT_S).map(lambda v: v[0]).to_list() == [1, 3]
    assert [one.place.call_one().get(timeout=WAIT_S)[0] for one in namer] == [0, 1, 2, 3]


def test_values_come_back_in_the_shape_of_the_mesh_that_was_called(namer: Namer) -> None:
    values = namer.place.call().get(timeout=WAIT_S)
    assert values.sizes == {"rows": 2, "cols": 2}
    assert values.map(lambda value: value[0]).to_list() == [[0, 1], [2, 3]]
    assert [(point.rank, dict(point)) for point, _ in values.items()] == [(v[0], v[1]) for v in values.values()]
    assert values.slice(rows=1).item(cols=1)[0] == 3
    assert values.rank_value(2)[0] == 2


def test_actors_spawned_on_a_slice_count_their_ranks_within_it(procs: ProcMesh) -> None:
    half = procs.slice(rows=1).spawn("half", Namer)
    assert half.place.call().get(timeout=WAIT_S).to_list() == [
        (0, {"cols": 0}, {"cols": 2}, "half"),
        (1, {"cols": 1}, {"cols": 2}, "half"),
    ]


def test_a_future_gives_its_value_as_often_as_asked(namer: Namer) -> None:
    future = namer.place.call()
    assert future.get(timeout=WAIT_S) is future.get()
    assert future.done()
    assert future.exception() is None
    seen: list[object] = []
    future.add_done_callback(seen.append)
    assert seen == [future]


def test_many_actors_of_a_class_may_start_in_one_process_at_once(procs: ProcMesh) -> None:
    one = procs.slice(rows=0, cols=0)
    one.spawn("hasty", Hasty).initialized.get(timeout=WAIT_S)
    echoes = [one.spawn(f"echo{i}", Echo, str(i)) for i in range(24)]
    greetings = [echo.greet.call_one("x") for echo in echoes]
    assert [greeting.get(timeout=WAIT_S) for greeting in greetings] == [f"{i} x" for i in range(24)]


def test_stopping_an_actor_mesh_cleans_up_and_leaves_its_processes(procs: ProcMesh, tmp_path: Path) -> None:
    one = procs.slice(rows=0, cols=1)
    tidy, at_once = one.spawn("tidy", Tidy, str(tmp_path / "a")), one.spawn("b", TidyAtOnce, str(tmp_path / "b"))
    assert tidy.ping.call_one().get(timeout=WAIT_S) == 1
    for mesh in (tidy, at_once, tidy):
        mesh.stop().get(timeout=WAIT_S)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["cleaned up, error None"] * 2
    with pytest.raises(MessageRefused, match="actor tidy has been stopped"):
        tidy.ping.call_one().get(timeout=WAIT_S)
    with pytest.raises(PermissionError, match="only the process that spawned"):
        tidy.slice().stop()
    assert os.path.exists(f"/proc/{one.peers[0].pid}")


def test_an_actor_stopped_while_its_constructor_runs_is_cleaned_up_all_the_same(
    procs: ProcMesh, tmp_path: Path
) -> None:
    slow = procs.slice(rows=0, cols=1).spawn("slow", TidyAfterAWhile, str(tmp_path / "slow"))
    slow.stop().get(timeout=WAIT_S)
    assert (tmp_path / "slow").read_text() == "cleaned up, error None"


def test_stopping_processes_cleans_their_actors_up_and_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    procs = this_host().spawn_procs(name="brief", log_folder=tmp_path, on_failure=print)
    first, second = procs.spawn("a", Tidy, str(tmp_path / "a")), procs.spawn("b", Tidy, str(tmp_path / "b"), fails=True)
    for mesh in (first, second):
        mesh.initialized.get(timeout=WAIT_S)
    (peer,) = procs.peers
    assert Path(peer.address.removeprefix("ipc://")).is_socket()
    for _ in range(2):
        procs.stop().get(timeout=WAIT_S)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["cleaned up, error None"] * 2
    assert "OSError: the drain is blocked" in (tmp_path / "brief-0.log").read_text()
    assert not os.path.exists(f"/proc/{peer.pid}")
    assert not [path for path in Path(this_node().folder).iterdir() if path.name.startswith("brief")]


def test_restarts_wait_longer_each_time_and_end_with_the_budget() -> None:
    policy = RestartPolicy(num_restarts=4, window_s=100.0, backoff_s=2.0, max_backoff_s=10.0)
    times: list[float] = []
    delays = []
    for now in (0.0, 10.0, 20.0, 30.0, 40.0):
        delays.append(policy.delay_s(times, now))
        times.append(now)
    assert delays == [2.0, 4.0, 8.0, 10.0, None]
    assert policy.delay_s(times, 145.0) == 2.0

"""Meshes on a real local Ray cluster of two nodes: placement, calls, node loss, room."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Iterator

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.runtime.actors import Echo, Relay
from tests.runtime.processes.ray_nodes import add_node, start_head
from vtriune import runtime
from vtriune.runtime import MeshFailure, RestartPolicy, steps
from vtriune.runtime.processes import ray_launcher, ray_process
from vtriune.runtime.processes.ray_launcher import NoRoom, RayPlaces, join

WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    runtime.shutdown()
    made = start_head(num_cpus=1)
    runtime.configure(bind=join(made.address))
    yield made
    runtime.shutdown()
    runtime.configure()
    ray.shutdown()
    made.shutdown()


def test_a_mesh_spreads_over_two_nodes_and_survives_the_loss_of_one(cluster: Cluster) -> None:
    second = add_node(cluster)
    failures: queue.Queue[MeshFailure] = queue.Queue()
    places = RayPlaces("spread", 2, strategy="STRICT_SPREAD", cpus=1)
    assert asyncio.run(places.reserve(WAIT_S)) == 2
    policy = RestartPolicy(num_restarts=3, backoff_s=0.1)
    procs = places.hosts().spawn_procs(name="spread", restart=policy, on_failure=failures.put)
    assert procs.sizes == {"hosts": 2, "procs": 1}
    echo = procs.spawn("echo", Echo, "from ray")
    assert echo.greet.call("x").get(timeout=WAIT_S).to_list() == [["from ray x"], ["from ray x"]]
    echo.slice(hosts=1, procs=0).toil.call_one(1, 0.0).get(timeout=WAIT_S)
    end = time.monotonic() + WAIT_S
    while ("spread-1", "toil") not in steps.latest():
        assert time.monotonic() < end, "the step of a process on another node did not arrive"
        time.sleep(0.1)
    assert {runtime.interface_of(peer) for peer in procs.peers} == {runtime.interface_of()} == {join()}

    cluster.remove_node(second)
    failure = failures.get(timeout=WAIT_S)
    assert failure.is_restarting
    assert failure.mesh_name == "spread"
    lost = failure.rank
    assert echo.greet.choose("y").get(timeout=WAIT_S) == "from ray y"
    with pytest.raises(MeshFailure, match=f"spread rank {lost}"):
        echo.slice(hosts=lost, procs=0).greet.call_one("y").get(timeout=WAIT_S)

    third = add_node(cluster)
    end = time.monotonic() + WAIT_S
    while echo.greet.call("z").exception(timeout=WAIT_S) is not None:
        assert time.monotonic() < end, "the lost rank did not come back with the cluster's new node"
        time.sleep(0.5)
    # A process that never knew the lost rank is told where it is now.
    relay = runtime.this_host().spawn_procs(name="relay", on_failure=failures.put).spawn(
        "relay", Relay, echo.slice(hosts=lost, procs=0)
    )  # fmt: skip
    assert relay.ask.call_one("w").get(timeout=WAIT_S) == "from ray w"
    procs.stop().get(timeout=WAIT_S)
    places.release()
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
    cluster.remove_node(third)


def test_an_elastic_role_takes_the_room_there_is_and_the_rest_when_a_node_joins(cluster: Cluster) -> None:
    async def grow() -> None:
        places = RayPlaces("elastic", 2, strategy="SPREAD", cpus=1)
        assert await places.reserve(1.0, is_elastic=True) == 1
        assert "Ray node" in await asyncio.wait_for(places.room(0), WAIT_S)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(places.room(1), 2.0)
        node = add_node(cluster)
        assert node.node_id in await asyncio.wait_for(places.room(1), WAIT_S)
        procs = await asyncio.to_thread(places.hosts().slice(hosts=1).spawn_procs, name="late", on_failure=print)
        assert await procs.spawn("echo", Echo, "late").greet.call_one("x") == "late x"
        await procs.stop()
        places.release()
        cluster.remove_node(node)

    asyncio.run(grow())


def test_a_worker_is_told_which_interface_has_its_nodes_address_unless_the_node_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "set by the node")
    (variable, name), *more = ray_process._interface("127.0.0.1").items()
    assert (variable, more) == ("NCCL_SOCKET_IFNAME", [])
    assert "127.0.0.1" in {address.address for address in psutil.net_if_addrs()[name]}
    assert ray_process._interface("192.0.2.77") == {}


def test_a_head_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127\.0\.0\.1:9 "):
        ray_launcher._knock("127.0.0.1:9")


def test_a_role_that_must_be_whole_says_what_the_cluster_lacks(cluster: Cluster) -> None:
    places = RayPlaces("learner", 2, strategy="STRICT_PACK", cpus=3, gpus=1)
    with pytest.raises(
        NoRoom, match=r"no room for learner: 2 places of CPU 3, GPU 1 each, STRICT_PACK.*CPU 1 .*GPU 0 "
    ):
        asyncio.run(places.reserve(1.0))

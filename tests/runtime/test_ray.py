"""Meshes on a real local Ray cluster of two nodes: placement, calls, node loss."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.runtime.actors import Echo
from vtriune import runtime
from vtriune.runtime import MeshFailure, RestartPolicy
from vtriune.runtime.ray_launcher import ray_hosts

WAIT_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    runtime.shutdown()
    # Ray gives its own agents 15 s to start, too little on a loaded machine.
    os.environ["RAY_agent_register_timeout_ms"] = "120000"
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    address = ray.util.get_node_ip_address()
    runtime.configure(bind=address)
    yield made
    runtime.shutdown()
    runtime.configure()
    ray.shutdown()
    made.shutdown()


def test_a_mesh_spreads_over_two_nodes_and_survives_the_loss_of_one(cluster: Cluster) -> None:
    second: Any = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    failures: queue.Queue[MeshFailure] = queue.Queue()
    hosts, places = ray_hosts(2, strategy="STRICT_SPREAD")
    policy = RestartPolicy(num_restarts=3, backoff_s=0.1)
    procs = hosts.spawn_procs(name="spread", restart=policy, on_failure=failures.put)
    assert procs.sizes == {"hosts": 2, "procs": 1}
    echo = procs.spawn("echo", Echo, "from ray")
    assert echo.greet.call("x").get(timeout=WAIT_S).to_list() == [["from ray x"], ["from ray x"]]
    assert all(peer.address.startswith("tcp://") for peer in procs.peers)

    cluster.remove_node(second)
    failure = failures.get(timeout=WAIT_S)
    assert failure.is_restarting
    assert failure.mesh_name == "spread"
    lost = failure.rank
    assert echo.greet.choose("y").get(timeout=WAIT_S) == "from ray y"
    with pytest.raises(MeshFailure, match=f"spread rank {lost}"):
        echo.slice(hosts=lost, procs=0).greet.call_one("y").get(timeout=WAIT_S)

    cluster.add_node(num_cpus=1)
    end = time.monotonic() + WAIT_S
    while echo.greet.call("z").exception(timeout=WAIT_S) is not None:
        assert time.monotonic() < end, "the lost rank did not come back with the cluster's new node"
        time.sleep(0.5)
    procs.stop().get(timeout=WAIT_S)
    places.release()

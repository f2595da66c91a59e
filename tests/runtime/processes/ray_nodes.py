"""Ray clusters of several nodes on this machine, for tests."""

import os
from typing import Any

from ray.cluster_utils import Cluster

_SETTINGS = {
    # Ray gives its processes 15 and 30 s to start, too little on a loaded machine.
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_raylet_start_wait_time_s": "120",
    # At Ray's default of 15 whatever else this machine does would come first.
    "RAY_worker_niceness": "0",
}
_OBJECT_STORE_BYTES = 80 << 20
"""Near the least Ray accepts: our messages do not use it."""


def start_head(num_cpus: int) -> Cluster:
    """A cluster of one node; to be shut down by the caller. CPUs are only counted."""
    os.environ.update(_SETTINGS)
    head = {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    return Cluster(initialize_head=True, head_node_args=head)


def add_node(cluster: Cluster, num_cpus: int = 1) -> Any:
    """One more node, when it is up."""
    node = cluster.add_node(num_cpus=num_cpus, object_store_memory=_OBJECT_STORE_BYTES)
    cluster.wait_for_nodes()
    return node

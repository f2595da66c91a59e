"""A run on a real Ray cluster of two nodes on this machine, started as a user starts it."""

import os
import re
from collections.abc import Callable, Iterator

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from tests.system.jobs import Job

FILE = "examples/ray_2_nodes.yaml"
OVERRIDES = ["evaluation.before=false", "evaluation.after=false", "tracking.wandb=off"]
OBJECT_STORE_BYTES = 80 << 20
"""Near the least Ray accepts: our messages do not use it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray gives its own agents 15 s to start, too little on a loaded machine.
    os.environ["RAY_agent_register_timeout_ms"] = "120000"
    # Room for learner, verifiers and one generator; the second generator fits on another node only.
    head = {"num_cpus": 5, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


def log_of(job: Job) -> str:
    path = job.run_folder / "logs" / "controller-0.log"
    return path.read_text() if path.is_file() else ""


def nodes_of_generators(job: Job) -> dict[int, str]:
    """Ray's id of the node that each generator was placed on last."""
    found = re.findall(r"generator (\d+) is placed on \S+ \(Ray node (\w+)\)", log_of(job))
    return {int(rank): node for rank, node in found}


def workers_left() -> list[str]:
    """Titles of our workers below this process, whose children the nodes are."""
    titles = []
    for process in psutil.Process().children(recursive=True):
        try:
            titles.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return [title for title in titles if title.startswith("vtriune ")]


def generators_by_version(job: Job) -> dict[int, set[int]]:
    """Who sampled what each version was trained on."""
    rows = [row for path in (job.run_folder / "rollouts").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {
        version: {row["generator"] for row in rows if row["consumed_version"] == version}
        for version in {row["consumed_version"] for row in rows}
    }


@pytest.mark.timeout(420)
def test_a_run_spreads_over_two_nodes_and_completes_though_one_is_lost(
    cluster: Cluster, start: Callable[..., Job]
) -> None:
    second = cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)
    job = start("run.steps=8", f"cluster.address={cluster.address}", *OVERRIDES, file=FILE)
    job.wait_for_version(2)
    placed = nodes_of_generators(job)
    assert set(placed.values()) == {cluster.head_node.node_id, second.node_id}
    lost = next(rank for rank, node in placed.items() if node == second.node_id)
    cluster.remove_node(second)
    assert job.finish() == 0, job.text()

    lines = job.lines()
    assert [line["version"] for line in lines] == list(range(1, 9))
    assert all(line["mismatch/max_abs"] <= 1e-4 for line in lines)
    last = lines[-1]
    assert (last["ledger/consumed"], last["ledger/lost"], last["generators/deaths"]) == (64, 0, 1)
    assert f"generator {lost} died" in log_of(job)
    assert f"waiting for room on the Ray cluster: generator {lost}" in job.text()
    by_version = generators_by_version(job)
    assert set().union(*by_version.values()) == {0, 1}
    assert by_version[8] == {1 - lost}
    assert workers_left() == []

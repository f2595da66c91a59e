"""A run on a real Ray cluster of two nodes on this machine, started as a user starts it."""

import os
import re
import signal
from collections.abc import Callable, Iterator

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from tests.runtime.ray_nodes import add_node, start_head
from tests.system.jobs import Job

FILE = "examples/ray_2_nodes.yaml"
START_S = 420
"""On a machine that does other things besides; half a minute on a quiet one."""
OVERRIDES = ["evaluation.before=false", "evaluation.after=false", "tracking.wandb=off"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Room for learner, verifiers and one generator; the second generator fits on another node only.
    made = start_head(num_cpus=5)
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
    """Ranks of the generators that sampled what was trained on at each version."""
    rows = [row for path in (job.run_folder / "rollouts").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    return {
        version: {row["generator"] for row in rows if row["consumed_version"] == version}
        for version in {row["consumed_version"] for row in rows if row["purpose"] == "train"}
    }


@pytest.mark.timeout(900)
def test_a_run_spreads_over_two_nodes_and_completes_though_one_is_lost(
    cluster: Cluster, start: Callable[..., Job]
) -> None:
    second = add_node(cluster)
    job = start("run.steps=8", f"cluster.address={cluster.address}", *OVERRIDES, file=FILE)
    job.wait_for_version(2, START_S)
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
    assert re.findall(r"generator (\d+) died: .*", log_of(job)) == [str(lost)]
    # Its restart waited for room until the end: the first node has none left.
    assert log_of(job).count("is placed on") == 2
    by_version = generators_by_version(job)
    assert set().union(*by_version.values()) == {0, 1}
    assert by_version[7] == {1 - lost}
    assert workers_left() == []


@pytest.mark.timeout(900)
def test_a_run_starts_with_the_generator_that_has_room_and_takes_the_other_in_when_a_node_joins(
    cluster: Cluster, start: Callable[..., Job]
) -> None:
    job = start("run.steps=10000", f"cluster.address={cluster.address}", *OVERRIDES, file=FILE)
    job.wait_for_version(1, START_S)
    assert "room for 1 of 2 generators" in job.text()
    second = add_node(cluster)
    job.wait_for(
        lambda: 1 in set().union(*generators_by_version(job).values()), "group sampled by generator 1", START_S
    )
    assert nodes_of_generators(job) == {0: cluster.head_node.node_id, 1: second.node_id}
    os.kill(job.process.pid, signal.SIGINT)
    assert job.finish(60) == 0, job.text()
    last = job.lines()[-1]
    assert (last["ledger/lost"], last["generators/deaths"]) == (0, 0)
    assert workers_left() == []
    cluster.remove_node(second)

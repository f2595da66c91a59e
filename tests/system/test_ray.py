"""A run on a real Ray cluster of two nodes on this machine, started as a user starts it."""

import os
import re
import signal
from collections.abc import Callable, Iterator

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from tests.runtime.processes.ray_nodes import add_node, start_head
from tests.system.jobs import Job
from vtriune.record import archive

FILE = "examples/ray_2_nodes.yaml"
START_S = 420
"""On a machine that does other things besides; half a minute on a quiet one."""
OVERRIDES = ["evaluation.before=false", "evaluation.after=false", "tracking.wandb=off"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Room for learner, verifiers and one generator; the second generator fits on another node only.
    made = start_head(num_cpus=4)
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


def newest(job: Job) -> int:
    return max((int(line["version"]) for line in job.lines()), default=0)


def samplers(job: Job, version: int) -> set[int]:
    """Ranks of the generators that sampled what was trained on for `version`."""
    paths = dict(archive.files(job.run_folder / "rollouts", "version"))
    return (
        set(pq.read_table(paths[version], columns=["generator"])["generator"].to_pylist())
        if version in paths
        else set()
    )


@pytest.mark.timeout(900)
def test_a_run_starts_where_there_is_room_takes_in_a_node_that_joins_and_goes_on_when_it_is_lost(
    cluster: Cluster, start: Callable[..., Job]
) -> None:
    job = start("run.steps=10000", f"cluster.address={cluster.address}", *OVERRIDES, file=FILE)
    job.wait_for_version(1, START_S)
    assert "room for 1 of 2 generators" in job.text()

    second = add_node(cluster)
    job.wait_for(lambda: len(nodes_of_generators(job)) == 2, "place for the second generator", START_S)
    assert nodes_of_generators(job) == {0: cluster.head_node.node_id, 1: second.node_id}
    job.wait_for(lambda: 1 in samplers(job, newest(job)), "group sampled by generator 1", START_S)

    cluster.remove_node(second)
    lost_after = newest(job)
    # Its restart waits for room, which the first node has none of.
    job.wait_for_version(lost_after + 4)
    os.kill(job.process.pid, signal.SIGINT)
    assert job.finish(60) == 0, job.text()

    lines = job.lines()
    assert [line["version"] for line in lines] == list(range(1, len(lines) + 1))
    # Absent where nothing was compared: a batch without a token of its learner's version, a publish without a generator.
    for key in ("mismatch/max_abs", "publish/canary_max_abs"):
        assert max(line[key] for line in lines if key in line) <= 1e-4
    last = lines[-1]
    assert (last["ledger/consumed"], last["ledger/lost"], last["generators/deaths"]) == (8 * len(lines), 0, 1)
    assert re.findall(r"generator (\d+) died: .*", log_of(job)) == ["1"]
    assert log_of(job).count("is placed on") == 2
    assert samplers(job, 1) == samplers(job, len(lines)) == {0}
    assert workers_left() == []

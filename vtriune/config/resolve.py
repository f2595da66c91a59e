"""Fills in what a file leaves to the machine. Called once by launch; the run folder's config.yaml holds the outcome."""

import os

from msgspec.structs import replace

from vtriune.config.tree import Config


def resolve(config: Config, num_cores: int | None = None) -> Config:
    """`config` with every `threads: 0` set to the cores this process may use.

    On-policy, generators and learner take turns: each role gets all cores, shared between its processes. Off-policy they
    work at the same time and share them. Two processes with more threads than cores wait for each other's stragglers.
    """
    cluster = config.cluster
    cores = num_cores or len(os.sched_getaffinity(0))
    is_shared = config.policy.mode == "off_policy" or any(
        phase.mode == "off_policy" for phase in config.policy.schedule
    )
    num_procs = cluster.generators.procs + cluster.learner.procs if is_shared else 0
    generators, learner = (
        replace(role, threads=role.threads or max(1, cores // (num_procs or role.procs)))
        for role in (cluster.generators, cluster.learner)
    )
    return replace(config, cluster=replace(cluster, generators=generators, learner=learner))

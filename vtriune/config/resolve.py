"""Fills in what a file leaves to the machine. Called once by launch; the run folder's config.yaml holds the outcome."""

import os
from pathlib import Path

from msgspec.structs import replace

from vtriune.config.tree import Config


def resolve(config: Config, num_cores: int | None = None) -> Config:
    """`config` as this machine runs it: `threads: 0` set to the cores this process may use; with Ray, absolute folders."""
    if config.cluster.launcher == "ray":
        return _with_absolute_folders(config)
    return _with_threads(config, num_cores or len(os.sched_getaffinity(0)))


def _with_absolute_folders(config: Config) -> Config:
    """Processes on other nodes have another working folder; what they share has one path on all of them."""
    run, data, model = config.run, config.data, config.model
    return replace(
        config,
        run=replace(run, folder=_absolute(run.folder)),
        data=replace(data, store=_absolute(data.store)),
        model=replace(model, path=_absolute(model.path)),
    )


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else path


def _with_threads(config: Config, cores: int) -> Config:
    """On-policy, generators and learner take turns: each role gets all cores, shared between its processes. Off-policy they
    work at the same time and share them. Two processes with more threads than cores wait for each other's stragglers.
    """
    cluster = config.cluster
    is_shared = config.policy.mode == "off_policy" or any(
        phase.mode == "off_policy" for phase in config.policy.schedule
    )
    num_procs = cluster.generators.procs + cluster.learner.procs if is_shared else 0
    generators, learner = (
        replace(role, threads=role.threads or max(1, cores // (num_procs or role.procs)))
        for role in (cluster.generators, cluster.learner)
    )
    return replace(config, cluster=replace(cluster, generators=generators, learner=learner))

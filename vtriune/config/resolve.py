"""Fills in what a file leaves to the machine. Called once by launch; the run folder's config.yaml holds the outcome."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from verifiers.types import Frame
from vtriune.config.modes import is_ever_off_policy
from vtriune.config.sections.data import Files
from vtriune.config.tree import Config

ANSWER_FRAMES: dict[str, Frame] = {"qwen2_vl": "norm_1000", "qwen2_5_vl": "resized_px", "qwen3_vl": "norm_1000"}
"""What families of models are trained to answer in, by `model_type` of config.json; a family without one: original_px."""


def resolve(config: Config, num_cores: int | None = None) -> Config:
    """`config` as this machine runs it: `~` is this user's home; `rewards.frame: auto` the model's frame; `threads: 0` the cores this
    process may use, or, with Ray, folders are absolute."""
    config = _with_frame(config)
    if config.cluster.launcher == "ray":
        return _with_paths(config, _absolute)
    return _with_threads(_with_paths(config, str), num_cores or len(os.sched_getaffinity(0)))


def _with_frame(config: Config) -> Config:
    """Where a model folder says what it is; one that does not is refused later, by name."""
    try:
        described = json.loads((Path(config.model.path).expanduser() / "config.json").read_text())
        frame = ANSWER_FRAMES.get(described["model_type"], "original_px")
    except (OSError, ValueError, KeyError, TypeError):
        return config
    return replace(config, rewards=replace(config.rewards, frame=frame)) if config.rewards.frame == "auto" else config


def _with_paths(config: Config, of_folder: Callable[[str], str]) -> Config:
    """Every path with its `~` as this user's home, and of folders what `of_folder` makes of them."""
    data, model, evaluation = config.data, config.model, config.evaluation

    def folder(path: str) -> str:
        return of_folder(os.path.expanduser(path)) if path else path

    def files(entries: list[str | Files]) -> list[str | Files]:
        expand = os.path.expanduser
        return [
            expand(entry) if isinstance(entry, str) else replace(entry, files=list(map(expand, entry.files)))
            for entry in entries
        ]

    return replace(
        config,
        run=replace(config.run, folder=folder(config.run.folder)),
        data=replace(data, store=folder(data.store), train=files(data.train), test=files(data.test)),
        model=replace(model, path=folder(model.path), feature_cache=folder(model.feature_cache)),
        evaluation=replace(evaluation, files=files(evaluation.files)),
    )


def _absolute(path: str) -> str:
    """Processes on other nodes have another working folder; what they share has one path on all of them."""
    return str(Path(path).absolute())


def _with_threads(config: Config, cores: int) -> Config:
    """On-policy, generators and learner take turns: each role gets all cores, shared between its processes. Off-policy they
    work at the same time and share them. Two processes with more threads than cores wait for each other's stragglers.
    """
    cluster = config.cluster
    is_shared = is_ever_off_policy(config.policy)
    num_procs = cluster.generators.procs + cluster.learner.procs if is_shared else 0
    generators, learner = (
        replace(role, threads=role.threads or max(1, cores // (num_procs or role.procs)))
        for role in (cluster.generators, cluster.learner)
    )
    return replace(config, cluster=replace(cluster, generators=generators, learner=learner))

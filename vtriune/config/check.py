"""Refuses what keys cannot say together, before anything starts. Called once by each command line.

What a key takes by itself is part of its type, and what the keys of one section mean together is the section's to know: both
stand in `vtriune.config.sections`. Here are the rules between sections.
"""

from collections.abc import Iterable

import msgspec

from vtriune.config import modes
from vtriune.config.load import ConfigError, key_problems
from vtriune.config.tree import Config, Section

NUM_ATTEMPTS = 2
"""Of a verifier at one answer, each of them within `rewards.deadline_s`."""


def check(config: Config) -> None:
    """Raise one ConfigError that lists every problem of `config`, but for the contents of the data files.

    Rules between keys are asked once every key is right by itself.
    """
    problems = list(key_problems(msgspec.to_builtins(config), Config))
    if problems := problems or [*_section_problems(config), *_problems_between(config)]:
        raise ConfigError("\n".join(problems))


def _section_problems(section: Section) -> Iterable[str]:
    yield from section.problems()
    for name in section.__struct_fields__:
        if isinstance(below := getattr(section, name), Section):
            yield from _section_problems(below)


def _problems_between(config: Config) -> Iterable[str]:
    evaluation, policy, generators = config.evaluation, config.policy, config.cluster.generators
    if evaluation.is_on and not (config.data.test or evaluation.files):
        yield "data.test: no held-out file, but evaluation is on; name files or set evaluation.before, after and every off"
    for choice in modes.choices(policy):
        yield from modes.problems(config, choice)
    if policy.update_batch not in (None, policy.rollout_batch) and not modes.is_ever_off_policy(policy):
        # Where a schedule or a switch makes such a run on-policy for a while, a batch is one update then.
        yield (
            f"policy.update_batch: {policy.update_batch}, but this run is never off_policy; it must equal rollout_batch "
            f"({policy.rollout_batch}), or write mode: off_policy"
        )
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    if longest > generators.max_model_len:
        yield (
            f"cluster.generators.max_model_len: {generators.max_model_len} is below data.max_prompt_tokens + "
            f"sampling.max_tokens ({longest})"
        )
    for module in config.model.freeze:
        if (rate := getattr(config.optimizer, f"lr_{module}")) is not None:
            yield f"optimizer.lr_{module}: {rate:g}, but model.freeze holds {module}, which is not trained; leave one of them out"
    yield from _problems_of_clocks(config)
    if (step := generators.max_batched_tokens) is not None and step < generators.max_sequences:
        yield (
            f"cluster.generators.max_batched_tokens: {step} is below max_sequences ({generators.max_sequences}), each of which "
            "takes a token of a step"
        )
    if config.sampling.seeded and not generators.gpus and step is not None and step < generators.max_model_len:
        yield (
            f"cluster.generators.max_batched_tokens: {step} is below max_model_len ({generators.max_model_len}), and on a CPU "
            "sampling.seeded computes no prompt in parts; raise it, or leave it null"
        )
    if generators.max_sequences < policy.group_size:
        yield f"cluster.generators.max_sequences: {generators.max_sequences} is below policy.group_size ({policy.group_size})"


def _problems_of_clocks(config: Config) -> Iterable[str]:
    """Whoever waits longest must have the longest patience: answer < lease < stall, and a frozen process is found within a lease."""
    lease_s, cluster, deadline_s = config.policy.lease_s, config.cluster, config.rewards.deadline_s
    if cluster.stall_s is not None and cluster.stall_s < lease_s:
        yield f"cluster.stall_s: {cluster.stall_s:g} is below policy.lease_s ({lease_s:g}); raise it, or leave it out"
    if cluster.heartbeat_s >= lease_s:
        yield f"cluster.heartbeat_s: {cluster.heartbeat_s:g} is not below policy.lease_s ({lease_s:g}); frozen engines outlast it"
    if NUM_ATTEMPTS * deadline_s > lease_s:
        yield (
            f"rewards.deadline_s: {NUM_ATTEMPTS} attempts of {deadline_s:g} s are more than policy.lease_s ({lease_s:g}), which "
            "a group has until it is scored"
        )

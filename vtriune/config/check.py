"""Refuses values and pairs of values that cannot be run, before anything starts. Called once by each command line."""

import importlib.util
import ipaddress
import socket
from collections.abc import Iterable
from pathlib import Path

from vtriune.config.load import ConfigError
from vtriune.config.tree import Cluster, Config, Placement


def check(config: Config) -> None:
    """Raise one ConfigError that lists every problem of `config`; files of the data are the data section's affair."""
    problems = [
        *_run_problems(config),
        *_policy_problems(config),
        *_model_problems(config),
        *_number_problems(config),
        *_cluster_problems(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _run_problems(config: Config) -> Iterable[str]:
    if (config.run.steps is None) == (config.run.epochs is None):
        yield f"run: set exactly one of steps ({config.run.steps}) and epochs ({config.run.epochs})"
    if not config.run.name or "/" in config.run.name or config.run.name in (".", ".."):
        yield f"run.name: {config.run.name!r} is no folder name"
    if not config.data.train:
        yield "data.train: no file named; list the Parquet files to train on"
    wants_evaluation = config.evaluation.before or config.evaluation.after or config.evaluation.every
    if wants_evaluation and not (config.data.test or config.evaluation.files):
        yield "data.test: no held-out file, but evaluation is on; name files or set evaluation.before, after and every off"
    if wants_evaluation and not config.evaluation.sampling:
        yield "evaluation.sampling: empty; write [greedy], [sampled] or both"


def _policy_problems(config: Config) -> Iterable[str]:
    policy = config.policy
    update_batch = policy.update_batch or policy.rollout_batch
    if policy.mode == "on_policy":
        if policy.max_staleness:
            yield (
                f"policy.max_staleness: {policy.max_staleness} with mode on_policy; on-policy data is never stale: "
                "set it to 0 or write mode: off_policy"
            )
        if update_batch != policy.rollout_batch:
            yield (
                f"policy.update_batch: {update_batch} with mode on_policy; it must equal rollout_batch "
                f"({policy.rollout_batch}), or write mode: off_policy"
            )
    if update_batch > policy.rollout_batch or policy.rollout_batch % update_batch:
        yield f"policy.rollout_batch: {policy.rollout_batch} is not a multiple of update_batch ({update_batch})"
    if policy.max_staleness is not None and policy.max_staleness < 0:
        yield f"policy.max_staleness: {policy.max_staleness} is negative"
    if policy.group_size < 2:
        yield f"policy.group_size: {policy.group_size}; a group's advantage needs at least 2 completions"
    if policy.max_oversample < 1:
        yield f"policy.max_oversample: {policy.max_oversample} is below 1"
    if "vit" not in config.model.freeze and policy.in_flight == "continue" and policy.mode == "off_policy":
        yield "policy.in_flight: continue keeps image features of an older ViT; freeze vit, or choose recompute or drain"
    yield from _schedule_problems(config)


def _schedule_problems(config: Config) -> Iterable[str]:
    schedule, last = config.policy.schedule, 0.0
    for index, phase in enumerate(schedule):
        final = index == len(schedule) - 1
        if phase.until is None and not final:
            yield f"policy.schedule[{index}]: only the last phase may leave `until` out"
        if phase.until is not None and not last < phase.until <= 1:
            yield f"policy.schedule[{index}].until: {phase.until} must rise and stay within (0, 1]"
        if phase.mode == "on_policy" and phase.max_staleness:
            yield f"policy.schedule[{index}]: on_policy with max_staleness {phase.max_staleness}"
        last = phase.until or last
    previous = 0.0
    for index, step in enumerate(config.rewards.iou_schedule):
        if not previous < step.until <= 1:
            yield f"rewards.iou_schedule[{index}].until: {step.until} must rise and stay within (0, 1]"
        if not 0 < step.threshold <= 1:
            yield f"rewards.iou_schedule[{index}].threshold: {step.threshold} is not in (0, 1]"
        previous = step.until


def _model_problems(config: Config) -> Iterable[str]:
    folder = Path(config.model.path)
    if not config.model.path or not folder.is_dir():
        yield f"model.path: {config.model.path!r} is no folder; name a Hugging Face model folder"
        return
    if not (folder / "config.json").is_file():
        yield f"model.path: {folder} has no config.json"
    if not (folder / "preprocessor_config.json").is_file() and not (folder / "processor_config.json").is_file():
        yield f"model.path: {folder} has no processor (preprocessor_config.json); save the model's processor beside its weights"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        yield f"model.path: {folder} has no tokenizer (tokenizer.json)"
    if not any(folder.glob("*.safetensors")):
        yield f"model.path: {folder} has no *.safetensors weights"
    if config.model.feature_cache and not {"vit", "connector"} <= set(config.model.freeze):
        yield (
            f"model.feature_cache: {config.model.feature_cache!r}, but features change while vit or connector is trained; "
            "freeze both, or leave feature_cache empty"
        )
    if set(config.model.freeze) >= {"vit", "connector", "llm"}:
        yield "model.freeze: vit, connector and llm are all frozen; nothing would be trained"


def _number_problems(config: Config) -> Iterable[str]:
    positive = {
        "run.steps": config.run.steps,
        "run.epochs": config.run.epochs,
        "policy.rollout_batch": config.policy.rollout_batch,
        "policy.update_batch": config.policy.update_batch,
        "policy.look_ahead": config.policy.look_ahead,
        "policy.lease_s": config.policy.lease_s,
        "sampling.max_tokens": config.sampling.max_tokens,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.clip_norm": config.optimizer.clip_norm,
        "optimizer.token_budget": config.optimizer.token_budget,
        "loss.clip_low": config.loss.clip_low,
        "loss.clip_high": config.loss.clip_high,
        "rewards.deadline_s": config.rewards.deadline_s,
        "rewards.memory_gib": config.rewards.memory_gib,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "checkpoint.keep": config.checkpoint.keep,
        "cluster.generators.procs": config.cluster.generators.procs,
        "cluster.verifiers.procs": config.cluster.verifiers.procs,
        "cluster.learner.procs": config.cluster.learner.procs,
    }
    yield from (
        f"{key}: {value} must be above 0" for key, value in positive.items() if value is not None and value <= 0
    )
    if not 0 < config.data.min_pixels <= config.data.max_pixels:
        yield f"data.min_pixels: {config.data.min_pixels} must lie in (0, data.max_pixels={config.data.max_pixels}]"
    if not 0 <= config.optimizer.warmup <= 1:
        yield f"optimizer.warmup: {config.optimizer.warmup} is a share of all updates, in [0, 1]"
    if config.sampling.temperature <= 0:
        yield f"sampling.temperature: {config.sampling.temperature} must be above 0; greedy samples cannot be trained on"
    if config.sampling.top_p != 1.0 or config.sampling.top_k not in (-1, 0):
        yield (
            "sampling.top_p / top_k: must be off (1.0 and -1): tokens cut from the sampler's distribution would have "
            "another probability in the learner"
        )
    if config.loss.dual_clip is not None and config.loss.dual_clip <= 1:
        yield f"loss.dual_clip: {config.loss.dual_clip} must be above 1"
    if (config.loss.kl == "none") != (config.loss.kl_weight == 0):
        yield f"loss: kl {config.loss.kl} with kl_weight {config.loss.kl_weight}; set both or neither"


def _cluster_problems(config: Config) -> Iterable[str]:
    yield from _bind_problems(config.cluster)
    yield from _ray_problems(config.cluster)
    generators, longest = config.cluster.generators, config.data.max_prompt_tokens + config.sampling.max_tokens
    if longest > generators.max_model_len:
        yield (
            f"cluster.generators.max_model_len: {generators.max_model_len} is below data.max_prompt_tokens + "
            f"sampling.max_tokens ({longest})"
        )
    if generators.max_sequences < config.policy.group_size:
        yield f"cluster.generators.max_sequences: {generators.max_sequences} is below policy.group_size ({config.policy.group_size})"


def _bind_problems(cluster: Cluster) -> Iterable[str]:
    if cluster.bind == "ipc":
        return
    try:
        address = ipaddress.ip_address(cluster.bind)
    except ValueError:
        yield f"cluster.bind: {cluster.bind!r} is no address; write ipc, 127.0.0.1 or the address of an interface of this machine"
        return
    if address.version != 4 or address.is_unspecified:
        yield f"cluster.bind: {cluster.bind}; name the IPv4 address of one interface, which the other processes can connect to"
    elif not _is_of_this_machine(cluster.bind):
        yield f"cluster.bind: no interface of this machine has the address {cluster.bind}; `ip address` lists those there are"
    elif cluster.launcher == "ray" and address.is_loopback:
        yield (
            f"cluster.bind: {cluster.bind} with launcher ray; other nodes cannot reach it: leave bind out, which takes the "
            "address under which Ray knows this machine, or name an interface"
        )


def _is_of_this_machine(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _ray_problems(cluster: Cluster) -> Iterable[str]:
    if cluster.launcher == "local":
        if cluster.address is not None:
            yield f"cluster.address: {cluster.address} with launcher local; write launcher: ray, or leave it out"
        if cluster.placement != Placement():
            yield "cluster.placement: with launcher local all processes run on this machine; write launcher: ray, or leave it out"
        return
    host, _, port = (cluster.address or "host:1").rpartition(":")
    if not host or "/" in host or not port.isdigit():
        yield (
            f"cluster.address: {cluster.address!r} is not host:port of the cluster's head; launch must run on one of its nodes, "
            "Ray's client (ray://) does not reach the others"
        )
    if importlib.util.find_spec("ray") is None:
        yield "cluster.launcher: ray is not installed; pip install 'vtriune[ray]', on every node"
    for role, threads in (("generators", cluster.generators.threads), ("learner", cluster.learner.threads)):
        if threads <= 0:
            yield f"cluster.{role}.threads: {threads} with launcher ray; write how many CPUs each process takes of its node"

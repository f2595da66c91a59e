"""`cluster`: which processes there are, where they run, what each may use."""

import importlib.util
import ipaddress
import socket
from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta

from vtriune.config.sections.section import Count, CountOrZero, Seconds, Section, Share, Text

MAX_PORT = 65535
Strategy = Literal["STRICT_PACK", "SPREAD"]


class Generators(Section, frozen=True):
    """The vLLM engines that sample completions."""

    procs: Count = 1
    """Number of engines, each a process of its own."""
    threads: CountOrZero = 2
    """OpenMP threads of each engine on a CPU, and the CPUs it takes of a Ray node. 0: a fair share of this machine's cores."""
    gpus: CountOrZero = 0
    """Accelerators of each engine; above 1 the model is split over them (tensor parallel). 0: the engine runs on the CPU."""
    max_sequences: Count = 64
    """Completions that an engine samples at the same time. A whole group has to fit."""
    kv_cache_gib: Annotated[float, Meta(gt=0, le=65536)] = 0.25
    """GiB of the key-value cache on a CPU; on an accelerator `memory_share` decides. The default is a small model's."""
    memory_share: Share = 0.85
    """Share of an accelerator's memory that an engine takes for weights, activations and key-value cache."""
    max_batched_tokens: Count | None = None
    """Tokens that one step of the engine computes at most, prompts and completions together. null: vLLM's own choice."""
    max_model_len: Count = 10240
    """Tokens of a prompt and its completion together: at least `data.max_prompt_tokens` + `sampling.max_tokens`."""
    enforce_eager: bool = True
    """On an accelerator: no CUDA graphs, which decode faster, but take time at the start and memory all along."""
    restarts: CountOrZero = 2
    """How often engines may be started again in the whole run, all together; on Ray, waiting for room counts as one start."""


class Verifiers(Section, frozen=True):
    """The verifier pools that score completions."""

    procs: Count = 1
    """Number of pools; any of them scores any group. One per node keeps the way short."""
    workers: Count = 1
    """Worker processes of each pool, for all but perception, which the pool itself scores. On Ray one CPU each and one for the pool."""
    restarts: CountOrZero = 2
    """How often pools may be started again within an hour, all pools counted together. Their groups are scored by another one."""


class Learner(Section, frozen=True):
    """The ranks that train."""

    procs: Count = 1
    """Number of ranks; model, gradients and optimiser are sharded over them."""
    threads: CountOrZero = 2
    """Threads of each rank on a CPU, and the CPUs it takes of a Ray node. 0: as for generators."""
    gpus: Annotated[int, Meta(ge=0, le=1)] = 0
    """1: each rank trains on an accelerator of its own. 0: on the CPU."""


class Placement(Section, frozen=True):
    """On Ray: how each role's processes are laid over the nodes. STRICT_PACK: all on one; SPREAD: on as many as there are."""

    generators: Strategy = "SPREAD"
    """SPREAD is elastic: the run starts with the engines that have room and takes others in when the cluster has room for them."""
    verifiers: Strategy = "SPREAD"
    """Of the pools. SPREAD keeps one near the generators of each node."""
    learner: Strategy = "STRICT_PACK"
    """Of the ranks. STRICT_PACK keeps their collectives on one node."""


class Cluster(Section, frozen=True):
    """Where processes run, how many there are of each role, when they count as dead."""

    launcher: Literal["local", "ray"] = "local"
    """local: every process on this machine. ray: on the nodes of a Ray cluster; messages stay on our own sockets."""
    bind: Text = "ipc"
    """ipc: Unix sockets in a private folder; on Ray, the address under which Ray knows this machine. Or the IPv4 address of an
    interface, such as 127.0.0.1: every socket then is TCP and speaks CURVE with keys of this run."""
    address: Text | None = None
    """Ray: head of the cluster, `host:port`. null: RAY_ADDRESS, or one that runs here, or a new one, which ends with the run."""
    placement: Placement = Placement()
    generators: Generators = Generators()
    verifiers: Verifiers = Verifiers()
    learner: Learner = Learner()
    heartbeat_s: Seconds = 10.0
    """Seconds after which a process of this machine that stands stopped counts as dead and is ended. Less than `policy.lease_s`."""
    stall_s: Seconds | None = None
    """Seconds after which a run in which no process gets anything done ends with all stacks: no token, group, micro-batch, file. At
    least `policy.lease_s`. null: `policy.lease_s` + 300."""

    def problems(self) -> Iterable[str]:
        yield from self._bind_problems()
        if self.launcher == "ray":
            yield from self._ray_problems()
            return
        if self.address is not None:
            yield f"cluster.address: {self.address} with launcher local; write launcher: ray, or leave it out"
        if self.placement != Placement():
            yield "cluster.placement: with launcher local all processes run on this machine; write launcher: ray, or leave it out"

    def _bind_problems(self) -> Iterable[str]:
        if self.bind == "ipc":
            return
        try:
            address = ipaddress.ip_address(self.bind)
        except ValueError:
            yield f"cluster.bind: {self.bind!r} is no address; write ipc, 127.0.0.1 or the address of an interface of this machine"
            return
        if address.version != 4 or address.is_unspecified:
            yield f"cluster.bind: {self.bind}; name the IPv4 address of one interface, which the other processes can connect to"
        elif not _is_of_this_machine(self.bind):
            yield f"cluster.bind: no interface of this machine has the address {self.bind}; `ip address` lists those there are"
        elif self.launcher == "ray" and address.is_loopback:
            yield f"cluster.bind: {self.bind} with launcher ray; other nodes cannot reach it: leave bind out, or name an interface"

    def _ray_problems(self) -> Iterable[str]:
        host, _, port = (self.address or "host:1").rpartition(":")
        if not host or "/" in host or not port.isdecimal() or not 0 < int(port) <= MAX_PORT:
            yield (
                f"cluster.address: {self.address!r} is not host:port of the cluster's head; launch must run on one of its nodes, "
                "Ray's client (ray://) does not reach the others"
            )
        if importlib.util.find_spec("ray") is None:
            yield "cluster.launcher: ray is not installed; pip install 'vtriune[ray]', on every node"
        for role, threads in (("generators", self.generators.threads), ("learner", self.learner.threads)):
            if not threads:
                yield f"cluster.{role}.threads: 0 with launcher ray; write how many CPUs each process takes of its node"


def _is_of_this_machine(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True

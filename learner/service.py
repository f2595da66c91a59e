"""One learner rank as blocking calls: what `learner.actor` runs on its own thread. Usable without the runtime.

Order of calls: `open_store` (rank 0), `connect` (all ranks together), `ready`; then `deliver` from any thread, and the
collective ones (`train`, `publish`, `save`, `load`, `canary`; not `saved`) in the same order on every rank.
"""

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from learner import state
from learner.learner import Learner
from learner.model import build_model, materialise, num_parameters, shard
from learner.policy import Policy
from learner.prompts import Features
from learner.publishing import WeightSender
from learner.ranks import Ranks
from vtriune.config.tree import Config
from vtriune.data.processing import Preprocessor
from vtriune.data.store import StoreSet
from vtriune.messages import (
    Canary,
    PublishOrder,
    PublishReport,
    Rendezvous,
    SampleRef,
    ScoredGroup,
    TrainOrder,
    TrainReport,
)

DELIVERY_DEADLINE_S = 60.0
"""How long an order waits for groups that were reported but have not reached this rank."""


class NotReady(RuntimeError):
    """A call before `connect`."""


class LearnerService:
    """Rank `rank` of `num_ranks`; rank 0 opens its sockets at `host`, an address of its machine that all members reach."""

    def __init__(
        self,
        config: Config,
        run_folder: str,
        store_folders: Sequence[str],
        rank: int,
        num_ranks: int,
        host: str = "127.0.0.1",
    ):
        self.config, self.run_folder = config, Path(run_folder)
        self.ranks = Ranks(rank, num_ranks, host)
        self._host = host
        self._store_folders = tuple(store_folders)
        self._learner: Learner | None = None
        self._sender: WeightSender | None = None
        self._writing: state.Writing | None = None
        self._writers: dist.ProcessGroup | None = None
        """The ranks' group while threads write a checkpoint."""
        self._arrived = threading.Condition()

    def open_store(self) -> int:
        """Port of the ranks' store; rank 0 only."""
        return self.ranks.open_store()

    def connect(self, host: str, port: int) -> None:
        """Join the other ranks, load the model, open the stores."""
        torch.set_num_threads(self.config.cluster.learner.threads)
        device = _device(self.config, self.ranks.rank)
        mesh = self.ranks.connect(host, port, device)
        section = self.config.model
        policy = self._policy(mesh, device)
        reference = None
        if self.config.loss.kl_weight:
            reference = self._policy(mesh, device).requires_grad_(False)
        learner = Learner(self.config, policy, self._source(), group=mesh.get_group(), reference=reference)
        self._sender = WeightSender(
            policy.model,
            lambda name: policy.family.module_of(name) not in section.freeze,
            dtype=torch.bfloat16 if section.dtype == "bfloat16" else None,
            host=self._host,
        )
        self._writers = dist.new_group(backend="gloo")
        self._learner = learner

    def ready(self) -> dict[str, Any]:
        """`num_parameters` per module and `trainable`: the names that are trained."""
        model = self.learner.policy.model
        return {
            "num_parameters": num_parameters(model, self.learner.family),
            "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        }

    @property
    def learner(self) -> Learner:
        """Raises NotReady before `connect`."""
        if self._learner is None:
            raise NotReady("the learner has not been connected; call connect(host, port) on every rank first")
        return self._learner

    def deliver(self, scored: ScoredGroup) -> None:
        """Take a group; from any thread, also while training. Raises DeliveryError."""
        with self._arrived:
            self.learner.deliver(scored)
            self._arrived.notify_all()

    def train(self, order: TrainOrder) -> TrainReport:
        """Wait for the order's groups, then train. Collective."""
        wanted = [group_id for ids in order.updates for group_id in ids]
        inbox = self.learner.inbox
        with self._arrived:
            self._arrived.wait_for(lambda: not inbox.missing(wanted, order.attempts), DELIVERY_DEADLINE_S)
        # Absent after the deadline: `train` raises and names them.
        return self.learner.train(order)

    def open_rendezvous(self, num_members: int) -> Rendezvous:
        """Rank 0: where a publish's weight group meets."""
        return self._weights.open_rendezvous(num_members)

    def publish(self, order: PublishOrder) -> PublishReport:
        """Send the weights of `order.version`. Collective."""
        return self._weights.send(order, self.ranks.rank)

    @property
    def _weights(self) -> WeightSender:
        if self._sender is None:
            raise NotReady("the learner has not been connected; call connect(host, port) on every rank first")
        return self._sender

    def canary(self, canary: Canary) -> list[float]:
        """Log-probs of the canary's response tokens under the current weights. Collective."""
        return self.learner.score(canary.sample, None, canary.response_ids)

    def save(self, folder: str) -> dict[str, Any]:
        """Copy the state and start writing this learner's part of a checkpoint; `saved` says when it is written. Collective.

        Waits for the checkpoint before, and raises what broke it. Returns `blocked_s`: how long training could not go on.
        """
        started = time.perf_counter()
        self.saved()
        self._writing = state.begin_save(self.learner, Path(folder), self._writers)
        return {"blocked_s": time.perf_counter() - started}

    def saved(self) -> dict[str, Any]:
        """Wait until this rank's part of the last checkpoint is written; from any thread, also while training.

        Returns `num_bytes` in its folder so far, 0 without a checkpoint. Raises what broke the write.
        """
        writing = self._writing
        return {"num_bytes": 0 if writing is None else writing.wait()}

    def load(self, folder: str) -> None:
        """Resume from a checkpoint. Collective."""
        state.load(self.learner, Path(folder))

    def close(self) -> None:
        """Let a checkpoint in hand be written, leave the group and free the weight group's sockets."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with contextlib.suppress(Exception):
                # Whoever asked for the checkpoint heard of its failure from `saved`.
                writing.wait()
        if self._sender is not None:
            self._sender.close()
        self._learner = self._sender = None
        self.ranks.close()

    def _policy(self, mesh: DeviceMesh, device: torch.device) -> Policy:
        """Sharded before it has values, so that no rank ever holds the whole model."""
        section = self.config.model
        model, family = build_model(section, device)
        settings: Any = model.config
        blocked = [getattr(settings, key, None) for key in ("image_token_id", "video_token_id")]
        policy = Policy(
            model,
            family,
            temperature=self.config.sampling.temperature,
            blocked_ids=[token for token in blocked if token is not None],
        )
        shard(policy, mesh, section, device)
        materialise(policy, model, section, device)
        return policy

    def _source(self) -> "Samples":
        data = self.config.data
        preprocessor = Preprocessor(self.config.model.path, data.min_pixels, data.max_pixels, data.max_prompt_tokens)
        return Samples(StoreSet.open(self._store_folders), preprocessor)


class Samples:
    """Prompts of the memory-mapped stores, preprocessed: the learner's `Source`."""

    def __init__(self, stores: StoreSet, preprocessor: Preprocessor):
        self._stores, self._preprocessor = stores, preprocessor

    def __call__(self, sample: SampleRef, prompt_seed: int | None) -> Features:
        prompt = self._preprocessor.prepare(self._stores.get(sample), prompt_seed)
        return self._preprocessor.features(prompt)


def _device(config: Config, rank: int) -> torch.device:
    """The CPU, or the accelerator of this rank among those the process sees."""
    if not config.cluster.learner.gpus:
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device

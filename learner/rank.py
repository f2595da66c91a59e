"""One learner rank as blocking calls: what `learner.actor` runs on its own thread. Usable without the runtime.

Order of calls: `open_store` (rank 0), `connect` (all ranks together); then `deliver` from any thread, and the
collective ones (`train`, `publish`, `save`, `load`, `canary`; not `saved`) in the same order on every rank.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from learner import checkpointing
from learner.learner import Learner
from learner.model.build import build_policy, materialise, shard
from learner.model.policy import Policy
from learner.process_group import RankGroup
from learner.publishing import WeightSender
from vtriune.config.tree import Config
from vtriune.data.processing import Preprocessor, Prompt
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
from vtriune.runtime import report_step

IMAGE_BYTES = 1 << 30
"""Decoded images that a rank keeps for a trained tower: of some 340 groups with an image of a megapixel."""
DELIVERY_DEADLINE_S = 60.0
"""How long an order waits for groups that were reported but have not reached this rank."""


T = TypeVar("T")


class NotConnected(RuntimeError):
    """A call before `connect`."""


class LearnerRank:
    """Rank `rank` of `num_ranks`; rank 0 opens its sockets at `host`, an address of its machine that all members reach."""

    def __init__(
        self,
        config: Config,
        store_folders: Sequence[str],
        rank: int,
        num_ranks: int,
        host: str = "127.0.0.1",
    ):
        self.config = config
        self.ranks = RankGroup(rank, num_ranks, host)
        self._host = host
        self._store_folders = tuple(store_folders)
        self._learner: Learner | None = None
        self._sender: WeightSender | None = None
        self._writing: checkpointing.Writing | None = None
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
        report_step("start", "joins the other ranks")
        mesh = self.ranks.connect(host, port, device)
        section = self.config.model
        policy = self._policy(mesh, device)
        reference = self._policy(mesh, device).requires_grad_(False) if self.config.loss.kl_weight else None
        learner = Learner(self.config, policy, self._source(), group=mesh.get_group(), reference=reference)
        self._sender = WeightSender(
            policy.model,
            lambda name: policy.family.module_of(name) not in section.freeze,
            dtype=torch.bfloat16 if section.dtype == "bfloat16" else None,
            host=self._host,
        )
        self._writers = dist.new_group(backend="gloo")
        self._learner = learner

    @property
    def learner(self) -> Learner:
        """Raises NotConnected before `connect`."""
        return _connected(self._learner)

    def deliver(self, scored: ScoredGroup) -> None:
        """Take a group; from any thread, also while training. Raises DeliveryError."""
        with self._arrived:
            self.learner.deliver(scored)
            self._arrived.notify_all()

    def train(self, order: TrainOrder) -> TrainReport:
        """Wait for the order's groups, then train. Collective."""
        inbox = self.learner.inbox
        report_step("training", "waits for groups that are on their way", DELIVERY_DEADLINE_S)
        with self._arrived:
            self._arrived.wait_for(lambda: not inbox.missing(order.group_ids, order.attempts), DELIVERY_DEADLINE_S)
        # Absent after the deadline: `train` raises and names them.
        return self.learner.train(order)

    def open_rendezvous(self, num_members: int) -> Rendezvous:
        """Rank 0: where a publish's weight group meets."""
        return _connected(self._sender).open_rendezvous(num_members)

    def publish(self, order: PublishOrder) -> PublishReport:
        """Send the weights of `order.version`. Collective."""
        return _connected(self._sender).send(order, self.ranks.rank)

    def canary(self, canary: Canary) -> list[float]:
        """Log-probs of the canary's response tokens under the current weights. Collective."""
        return self.learner.score(canary.sample, None, canary.response_ids)

    def save(self, folder: str) -> None:
        """Copy the state and start writing this learner's part of a checkpoint; `saved` says when it is written. Collective.

        Waits for the checkpoint before, and raises what broke it.
        """
        self.saved()
        self._writing = checkpointing.begin_save(self.learner, Path(folder), self._writers)

    def saved(self) -> None:
        """Wait until this rank's part of the last checkpoint, if there is one, is written; from any thread, also while training.

        Raises what broke the write.
        """
        writing = self._writing
        if writing is not None:
            writing.wait()

    def load(self, folder: str) -> None:
        """Resume from a checkpoint. Collective."""
        checkpointing.load(self.learner, Path(folder))

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
        policy = build_policy(section, device, temperature=self.config.sampling.temperature)
        shard(policy, mesh, section, device)
        materialise(policy, section, device)
        return policy

    def _source(self) -> "Samples":
        data = self.config.data
        preprocessor = Preprocessor(self.config.model.path, data.min_pixels, data.max_pixels, data.max_prompt_tokens)
        is_tower_frozen = {"vit", "connector"} <= set(self.config.model.freeze)
        return Samples(StoreSet.open(self._store_folders), preprocessor, 0 if is_tower_frozen else IMAGE_BYTES)


class Samples:
    """Prompts of the memory-mapped stores, preprocessed: the learner's `Source`.

    A tower that is trained reads a group's images in every forward: prompts are kept with them up to `num_bytes`, least recently used
    dropped first.
    """

    def __init__(self, stores: StoreSet, preprocessor: Preprocessor, num_bytes: int):
        self._stores, self._preprocessor = stores, preprocessor
        self._kept: OrderedDict[tuple[SampleRef, int | None], Prompt] = OrderedDict()
        self._num_bytes_left = num_bytes

    def __call__(self, sample: SampleRef, prompt_seed: int | None) -> Prompt:
        prompt = self._kept.pop((sample, prompt_seed), None)
        if prompt is None:
            prompt = self._preprocessor.prepare(self._stores.get(sample), prompt_seed)
            self._num_bytes_left -= prompt.num_bytes
        self._kept[sample, prompt_seed] = prompt
        while self._num_bytes_left < 0:
            self._num_bytes_left += self._kept.popitem(last=False)[1].num_bytes
        return prompt


def _connected(member: T | None) -> T:
    if member is None:
        raise NotConnected("the learner has not been connected; call connect(host, port) on every rank first")
    return member


def _device(config: Config, rank: int) -> torch.device:
    """The CPU, or the accelerator of this rank among those the process sees."""
    if not config.cluster.learner.gpus:
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device

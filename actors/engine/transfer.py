"""Our transport behind vLLM's weight-transfer API: the weight group's buckets into the running model, layer by layer.

vLLM's worker drives it: `init_weight_transfer_engine`, `start_weight_update`, `update_weights`, `finish_weight_update`. It is
the same class for gloo and NCCL. vLLM's own NCCL engine is not used: its broadcasts have no deadline (a dead sender hangs the
worker for good), it counts nothing, and its sender would have to import vllm in the learner.

On the CPU everything is received and counted before the model is touched: a publish that fails leaves the old weights in
place. On an accelerator a second copy of the weights may not fit, so buckets are loaded as they arrive, and a failure half-way
breaks the engine.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.engine.loop import EngineBroken
from vtriune.messages import Rendezvous, WeightEntry
from vtriune.weights.group import WeightGroup
from vtriune.weights.layout import Checksum, buckets_of, view_of
from vtriune.weights.meeting import Deadline

BACKEND = "vtriune"
EXTENSION = "actors.engine.transfer.ReceiptExtension"


@dataclass
class GroupInitInfo(WeightTransferInitInfo):
    """Where this worker's generator meets the learner."""

    host: str
    port: int
    num_members: int
    backend: Any
    group: str
    member: int
    deadline_s: float


@dataclass
class GroupUpdateInfo(WeightTransferUpdateInfo):
    """A manifest: (name, shape, dtype) of each tensor, in order."""

    entries: list[tuple[str, list[int], str]]


class GroupTransferEngine(WeightTransferEngine[GroupInitInfo, GroupUpdateInfo]):
    """Receives from a `WeightGroup`. With tensor parallelism the first worker is the member and passes each bucket on."""

    init_info_cls = GroupInitInfo
    update_info_cls = GroupUpdateInfo

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group: WeightGroup | None = None
        self._deadline = Deadline(0)
        self.checksum = Checksum()

    def init_transfer_engine(self, init_info: GroupInitInfo) -> None:
        """Join the data group unless this worker still holds it."""
        info = init_info
        self._deadline = Deadline(info.deadline_s)
        self.checksum = Checksum()
        held = None if self._group is None else (self._group.name, self._group.member)
        if get_tp_group().rank_in_group != 0 or held == (info.group, info.member):
            return
        self.shutdown()
        rendezvous = Rendezvous(info.host, info.port, info.num_members, info.backend)
        self._group = WeightGroup(rendezvous, info.group, info.member, self._deadline, self.device)

    def start_weight_update(self) -> None:
        """Nothing yet: the model stays whole until bytes have arrived."""

    def receive_weights(self, update_info: GroupUpdateInfo) -> None:
        """Receive and load every tensor of the manifest.

        Raises PeerFailure when the transfer fails while the model is untouched, EngineBroken when it is not.
        """
        incoming = self._incoming([WeightEntry(*entry) for entry in update_info.entries])
        is_staged = self.device.type == "cpu"
        arrived = iter(list(incoming)) if is_staged else incoming
        try:
            initialize_layerwise_reload(self.model)
            for entry, tensor in arrived:
                self._load(entry, tensor)
        except Exception as error:
            # Whatever it was, part of the model is on no device now.
            raise EngineBroken(f"loading weights failed, the engine's model is incomplete: {error}") from error

    def finish_weight_update(self) -> None:
        """Repack what was loaded for the kernels."""
        try:
            finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        except Exception as error:
            # As above.
            raise EngineBroken(f"repacking weights failed, the engine's model is incomplete: {error}") from error

    def shutdown(self) -> None:
        """Leave the data group."""
        if self._group is not None:
            self._group.close()
            self._group = None

    def _incoming(self, entries: list[WeightEntry]) -> Iterator[tuple[WeightEntry, torch.Tensor]]:
        """Tensors as they arrive: views of their bucket, which lives as long as they do."""
        tensor_parallel = get_tp_group()
        device = self.device if self._group is None else self._group.device
        for bucket in buckets_of(entries):
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device)
            if self._group is not None:
                self._group.broadcast(buffer, self._deadline)
            if tensor_parallel.world_size > 1:
                buffer = tensor_parallel.broadcast(buffer.to(self.device), src=0)
            for slot in bucket.slots:
                tensor = view_of(buffer, slot)
                self.checksum.add(slot.entry, tensor)
                yield slot.entry, tensor

    def _load(self, entry: WeightEntry, tensor: torch.Tensor) -> None:
        model: Any = self.model
        loaded = model.load_weights([(entry.name, tensor)])
        if not loaded and not self._is_alias(entry.name):
            raise EngineBroken(f"the engine's model passed over {entry.name}: {entry.shape} {entry.dtype}")

    def _is_alias(self, name: str) -> bool:
        """A tied output layer without a packed copy of its own is loaded with the embedding."""
        return name == "lm_head.weight" and bool(self.model_config.hf_text_config.tie_word_embeddings)


class ReceiptExtension:
    """Added by vLLM to its worker class: what the last update loaded, by a name `collective_rpc` can call."""

    weight_transfer_engine: GroupTransferEngine

    def weight_receipt(self) -> tuple[int, int, str]:
        """(tensors, bytes, checksum) of the last update."""
        checksum = self.weight_transfer_engine.checksum
        return checksum.num_tensors, checksum.num_bytes, checksum.hexdigest()

"""Sends the model's weights to the generators: gather a bucket on all ranks, stay in step, rank 0 broadcasts, free.

Called by the learner's actor, on every rank: `open_rendezvous` on rank 0, then `send` on all ranks with the same order while the
generators receive. Extra memory on each rank: one gathered tensor; on rank 0 one bucket too (`vtriune.weights.layout.BUCKET_BYTES`).
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore

from learner.model.sharding import device_of, gathered
from vtriune.messages import PublishOrder, PublishReport, Rendezvous, WeightEntry, WeightManifest
from vtriune.runtime import report_step
from vtriune.weights.group import WeightGroup
from vtriune.weights.layout import Bucket, Checksum, buckets_of, entry_of, view_of
from vtriune.weights.meeting import Deadline, Meeting, PeerFailure, Phase, PublishFailure, Receipt, listen

_GRACE_S = 10.0
"""Ranks wait this much longer for each other than for generators, so that rank 0's own account of a failure comes first."""


class WeightSender:
    """Publishes `model`, sharded by FSDP2 or not. Construct on all ranks together.

    model      its `state_dict()` names are the published ones
    trainable  whether the parameter of this name changes in training; what it refuses is sent only by full publishes
    dtype      floating-point tensors are sent as this type; None: as they are
    host       address of rank 0's machine at which generators meet it
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Callable[[str], bool],
        *,
        dtype: torch.dtype | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._model, self._trainable = model, trainable
        self._dtype, self._host = dtype, host
        self._device = device_of(model)
        self._backend: Literal["gloo", "nccl"] = "nccl" if self._device.type == "cuda" else "gloo"
        # On the CPU whatever carries the gradients: a flag must not queue behind kernels.
        self._flags = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._listening: tuple[TCPStore, Rendezvous] | None = None
        self._group: WeightGroup | None = None
        self._group_size = 0

    def open_rendezvous(self, num_members: int) -> Rendezvous:
        """Rank 0: serve the store of the next publish; `num_members` counts the learner."""
        self._listening = listen(self._host, num_members, self._backend)
        return self._listening[1]

    def send(self, order: PublishOrder, rank: int) -> PublishReport:
        """Every rank: take part in publishing `order.version`. Returns when every generator has loaded it.

        Raises PublishFailure on all ranks within `order.deadline_s` (and a grace of 10 s between ranks) when any member
        fails; the sender can take part in another publish afterwards.
        """
        start = time.monotonic()
        deadline = Deadline(order.deadline_s)
        root = _Root(self, order, deadline) if rank == 0 else None
        tensors = self._tensors(order.full)
        manifest = WeightManifest(order.version, [self._entry(name, tensor) for name, tensor in tensors.items()])
        try:
            with self._in_step("agree", deadline):
                if root is not None:
                    root.agree(manifest)
            for index, bucket in enumerate(buckets_of(manifest.entries), 1):
                report_step("publish", f"bucket {index} of version {order.version}")
                with self._in_step("transfer", deadline):
                    self._send_bucket(bucket, tensors, root)
            with self._in_step("load", deadline):
                if root is not None:
                    root.collect()
        except Exception as error:
            # Generators wait for rank 0 alone, so it passes on whatever broke on any rank.
            if root is None:
                raise
            raise root.abandon(error) from error
        total = root.checksum if root is not None else Checksum()
        return PublishReport(
            order.version, total.num_tensors, total.num_bytes, total.hexdigest(), time.monotonic() - start
        )

    def close(self) -> None:
        """Leave the data group and stop serving the store."""
        self._leave()
        self._listening = None

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _tensors(self, full: bool) -> dict[str, torch.Tensor]:
        """By name, in `state_dict()` order. A tied output layer is there under its own name: engines keep packed copies of it."""
        state = self._model.state_dict(keep_vars=True)
        if full:
            return state
        chosen = {
            id(tensor) for name, tensor in state.items() if isinstance(tensor, nn.Parameter) and self._trainable(name)
        }
        return {name: tensor for name, tensor in state.items() if id(tensor) in chosen}

    def _entry(self, name: str, tensor: torch.Tensor) -> WeightEntry:
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        return entry_of(name, tensor.shape, dtype)

    def _send_bucket(self, bucket: Bucket, tensors: dict[str, torch.Tensor], root: "_Root | None") -> None:
        wholes = (gathered(tensors[slot.entry.name]) for slot in bucket.slots)
        if root is not None:
            root.broadcast(bucket, wholes)
        else:
            for _ in wholes:
                pass

    @contextlib.contextmanager
    def _in_step(self, phase: Phase, deadline: Deadline) -> Iterator[None]:
        """Run the body on every rank and leave it together: all succeeded, or all raise."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            # Raised below, after the other ranks know that they must not go on to the next collective.
            failure = error
        if self._any_failed(failure is not None, deadline) and failure is None:
            raise PeerFailure(phase, "another learner rank failed; its log says why")
        if isinstance(failure, PublishFailure):
            raise failure
        if failure is not None:
            # What the group raises is a PublishFailure already: this broke while gathering.
            origin: Phase = "gather" if phase == "transfer" else phase
            raise PublishFailure(origin, f"{type(failure).__name__}: {failure}") from failure

    def _any_failed(self, has_failed: bool, deadline: Deadline) -> bool:
        if self._flags is None:
            return has_failed
        flag = torch.tensor([int(has_failed)])
        try:
            work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._flags, async_op=True)
            work.wait(Deadline(deadline.left_s + _GRACE_S).left)
        except RuntimeError as error:
            if has_failed:
                return True
            raise PeerFailure("gather", f"a learner rank left or did not answer ({error})") from error
        return bool(flag.item())


class _Root:
    """Rank 0 in one publish, the root of the broadcast: the meeting, the data group, the checksum."""

    def __init__(self, sender: WeightSender, order: PublishOrder, deadline: Deadline) -> None:
        self.checksum = Checksum()
        self._sender, self._order, self._deadline = sender, order, deadline
        self._meeting: Meeting | None = None

    def agree(self, manifest: WeightManifest) -> None:
        """Phases meet and agree, then form the data group unless all members still hold it."""
        sender, rendezvous = self._sender, self._order.rendezvous
        if sender._listening is None or sender._listening[1] != rendezvous:
            raise PublishFailure("meet", f"rendezvous {rendezvous} is not open here; call open_rendezvous first")
        store = sender._listening[0]
        self._meeting = Meeting(rendezvous, 0, self._deadline, store)
        holding = sender._group.name if sender._group and sender._group_size == rendezvous.num_members else ""
        name = self._meeting.propose(holding, f"v{self._order.version}-{uuid.uuid4().hex[:12]}", manifest)
        if name != holding:
            sender._leave()
            sender._group_size = rendezvous.num_members
            sender._group = WeightGroup(rendezvous, name, 0, self._deadline, sender._device, store)

    def broadcast(self, bucket: Bucket, wholes: Iterable[torch.Tensor]) -> None:
        """Phase transfer, one bucket of the tensors that `wholes` gathers one by one."""
        group = self._sender._group
        assert group is not None
        buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=group.device)
        for slot, whole in zip(bucket.slots, wholes, strict=True):
            view = view_of(buffer, slot)
            view.copy_(whole)
            self.checksum.add(slot.entry, view)
        group.broadcast(buffer, self._deadline)

    def collect(self) -> None:
        """Phase load: every generator loaded just what was sent."""
        assert self._meeting is not None
        self._meeting.collect_receipts(Receipt(self.checksum.num_tensors, self.checksum.hexdigest()))

    def abandon(self, error: Exception) -> Exception:
        """Tell the generators, then leave the data group, which unblocks whoever waits in it. Returns the cause to raise: a
        member's own account of its failure where there is one, rather than the broken connection it left."""
        phase: Phase = error.phase if isinstance(error, PublishFailure) else "gather"
        cause = error if self._meeting is None else self._meeting.tell(phase, error)
        self._sender._leave()
        return cause

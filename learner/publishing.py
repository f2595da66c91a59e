"""Sends the model's weights to the generators: gather a bucket on all ranks, stay in step, rank 0 broadcasts, free.

Called by the learner's actor, on every rank: `open_rendezvous` on rank 0, then `send` on all ranks with the same order while the
generators receive. Extra memory on each rank: one gathered tensor; on rank 0 one bucket (`weight_layout.BUCKET_BYTES`) as well.
"""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from vtriune.messages import PublishOrder, PublishReport, Rendezvous, WeightEntry, WeightManifest
from vtriune.weight_group import Deadline, Meeting, PeerFailure, Phase, PublishFailure, Receipt, WeightGroup, listen
from vtriune.weight_layout import Bucket, Checksum, buckets_of, entry_of, view_of

_GRACE_S = 10.0
"""Ranks wait this much longer for each other than for generators, so that rank 0's own account of a failure comes first."""


class WeightSender:
    """Publishes `model`, sharded by FSDP2 or not. Construct on all ranks together.

    model      its `state_dict()` names are the published ones
    trainable  whether the parameter of this name changes in training; what it refuses is sent only by full publishes
    dtype      floating-point tensors are sent as this type; None: as they are
    host       address of rank 0's machine at which generators meet it
    backend    None: NCCL when the model is on an accelerator, else gloo
    """

    def __init__(
        self,
        model: nn.Module,
        trainable: Callable[[str], bool],
        *,
        dtype: torch.dtype | None = None,
        host: str = "127.0.0.1",
        backend: Literal["gloo", "nccl"] | None = None,
    ) -> None:
        self._model = model
        self._trainable = trainable
        self._dtype = dtype
        self._host = host
        self._device = device_of(model)
        self._backend: Literal["gloo", "nccl"] = backend or ("nccl" if self._device.type == "cuda" else "gloo")
        self._num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        # On the CPU whatever carries the gradients: a flag must not queue behind kernels.
        self._flags = dist.new_group(backend="gloo") if self._num_ranks > 1 else None
        self._listening: tuple[Any, Rendezvous] | None = None
        self._group: WeightGroup | None = None
        self._group_size = 0

    def manifest(self, full: bool, version: int = 0) -> WeightManifest:
        """What a publish sends, in order: everything, or trainable parameters only. Not collective."""
        tensors = self._tensors(full)
        return WeightManifest(version, [self._entry(name, tensor) for name, tensor in tensors.items()])

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
        courier = _Courier(self, order, deadline) if rank == 0 else None
        tensors = self._tensors(order.full)
        manifest = WeightManifest(order.version, [self._entry(name, tensor) for name, tensor in tensors.items()])
        try:
            with self._in_step("agree", deadline):
                if courier is not None:
                    courier.agree(manifest)
            for bucket in buckets_of(manifest.entries):
                with self._in_step("transfer", deadline):
                    self._send_bucket(bucket, tensors, courier)
            with self._in_step("load", deadline):
                if courier is not None:
                    courier.collect()
        except Exception as error:
            # Generators wait for rank 0 alone, so it passes on whatever broke on any rank.
            if courier is None:
                raise
            raise courier.abandon(error) from error
        total = courier.checksum if courier is not None else Checksum()
        return PublishReport(
            order.version, total.num_tensors, total.num_bytes, total.hexdigest(), time.monotonic() - start
        )

    def close(self) -> None:
        """Leave the data group and stop serving the store."""
        if self._group is not None:
            self._group.close()
        self._group, self._listening = None, None

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

    def _send_bucket(self, bucket: Bucket, tensors: dict[str, torch.Tensor], courier: "_Courier | None") -> None:
        buffer = courier.buffer(bucket) if courier is not None else None
        for slot in bucket.slots:
            whole = gathered(tensors[slot.entry.name])
            if courier is not None and buffer is not None:
                view = view_of(buffer, slot)
                view.copy_(whole)
                courier.checksum.add(slot.entry, view)
        if courier is not None and buffer is not None:
            courier.broadcast(buffer)

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


class _Courier:
    """Rank 0's end of one publish: the meeting, the data group, the checksum."""

    def __init__(self, sender: WeightSender, order: PublishOrder, deadline: Deadline) -> None:
        self.checksum = Checksum()
        self._sender = sender
        self._order = order
        self._deadline = deadline
        self._meeting: Meeting | None = None

    def agree(self, manifest: WeightManifest) -> None:
        """Phases meet and agree, then form the data group unless all members still hold it."""
        sender, rendezvous = self._sender, self._order.rendezvous
        if sender._listening is None or sender._listening[1] != rendezvous:
            raise PublishFailure("meet", f"rendezvous {rendezvous} is not open here; call open_rendezvous first")
        store = sender._listening[0]
        self._meeting = Meeting(rendezvous, 0, self._deadline, store)
        is_reusable = sender._group is not None and sender._group_size == rendezvous.num_members
        holding = sender._group.name if sender._group is not None and is_reusable else ""
        name = self._meeting.propose(holding, f"v{self._order.version}-{uuid.uuid4().hex[:12]}", manifest)
        if name != holding:
            if sender._group is not None:
                sender._group.close()
            sender._group, sender._group_size = None, rendezvous.num_members
            sender._group = WeightGroup(rendezvous, name, 0, self._deadline, sender._device, store)

    def buffer(self, bucket: Bucket) -> torch.Tensor:
        """uint8 (num_bytes,), where the data group sends from."""
        assert self._sender._group is not None
        return torch.zeros(bucket.num_bytes, dtype=torch.uint8, device=self._sender._group.device)

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Phase transfer, one bucket."""
        assert self._sender._group is not None
        self._sender._group.broadcast(buffer, self._deadline)

    def collect(self) -> None:
        """Phase load: every generator loaded just what was sent."""
        assert self._meeting is not None
        self._meeting.collect_receipts(Receipt(self.checksum.num_tensors, self.checksum.hexdigest()))

    def abandon(self, error: Exception) -> Exception:
        """Tell the generators, then leave the data group, which unblocks whoever waits in it. Returns the cause to raise: a
        member's own account of its failure where there is one, rather than the broken connection it left."""
        phase: Phase = error.phase if isinstance(error, PublishFailure) else "gather"
        cause = error if self._meeting is None else self._meeting.tell(phase, error)
        if self._sender._group is not None:
            self._sender._group.close()
            self._sender._group = None
        return cause


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on this rank; collective for a sharded one."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    home = sharded.device_mesh.device_type
    # Offloaded shards live on the CPU, their collectives on the accelerator.
    whole: torch.Tensor = (sharded if sharded.device.type == home else sharded.to(home)).full_tensor()
    return whole


def device_of(model: nn.Module) -> torch.device:
    """Where `model` computes, which is not where its parameters are when they are offloaded to the host."""
    tensor = next(model.parameters())
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device

"""The data group over which a publish's buckets travel, gloo or NCCL. Formed by both sides of a `vtriune.weights.meeting`."""

import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore

from vtriune.messages import Rendezvous
from vtriune.weights.meeting import FIRST_PAUSE_S, LAST_PAUSE_S, Deadline, PeerFailure, first_line, store_at


class WeightGroup:
    """The data group of a publish: member 0 broadcasts, the others receive. Forming it waits for every member.

    device    where the buffers live: CPU for gloo, this member's accelerator for NCCL
    Raises PeerFailure when the group does not form by the deadline.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        name: str,
        member: int,
        deadline: Deadline,
        device: torch.device,
        store: TCPStore | None = None,
    ) -> None:
        self.name = name
        self.member = member
        self.device = torch.device("cpu") if rendezvous.backend == "gloo" else device
        self._backend = rendezvous.backend
        try:
            served = PrefixStore(name, store or store_at(rendezvous, deadline.left))
            self._group = _form(served, rendezvous, member, deadline)
        except RuntimeError as error:
            raise PeerFailure("transfer", f"data group {name} did not form ({first_line(error)})") from error

    def broadcast(self, buffer: torch.Tensor, deadline: Deadline) -> None:
        """Member 0's `buffer` into everyone's, in place; returns when it has arrived.

        Raises PeerFailure when a member is gone or the deadline passes; the group is unusable then: close it.
        """
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = deadline.left
        try:
            work = self._group.broadcast([buffer], options)
            if self._backend == "nccl":
                _wait_on_device(work, deadline)
            else:
                work.wait(deadline.left)
        except RuntimeError as error:
            raise PeerFailure("transfer", f"a member left, or none answered in time ({first_line(error)})") from error

    def close(self) -> None:
        """Leave; peers that still wait in a broadcast get an error at once. Idempotent."""
        group, self._group = getattr(self, "_group", None), None  # type: ignore[assignment]
        if group is not None and self._backend == "nccl":
            group.abort()


def _form(store: PrefixStore, rendezvous: Rendezvous, member: int, deadline: Deadline) -> ProcessGroup:
    backend: Any = dist.ProcessGroupNCCL if rendezvous.backend == "nccl" else dist.ProcessGroupGloo
    options = backend.Options() if rendezvous.backend == "nccl" else backend._Options()
    options._timeout = deadline.left
    if rendezvous.backend == "gloo":
        own = _own_address(rendezvous.host, rendezvous.port)
        options._devices = [backend.create_device(hostname=own)]
    group: ProcessGroup = backend(store, member, rendezvous.num_members, options)
    return group


def _wait_on_device(work: dist.Work, deadline: Deadline) -> None:
    """NCCL's own wait returns when the kernel is queued: look until it is done, so that the deadline holds."""
    pause = FIRST_PAUSE_S
    while not work.is_completed():
        if not deadline.left_s:
            raise RuntimeError(f"broadcast not done within {deadline.seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_S)
    work.wait()


def _own_address(host: str, port: int) -> str:
    """This machine's address on the interface that reaches `host`: gloo would pick the one its host name resolves to."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])

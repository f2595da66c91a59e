"""The process group of the learner's ranks. Called by `learner.rank`, once per process."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class RankGroup:
    """Rank `rank` of `num_ranks`. Rank 0 serves the store on a port bound at 0; the others are told where."""

    def __init__(self, rank: int, num_ranks: int, host: str = "127.0.0.1", deadline_s: float = 600.0):
        self.rank, self.num_ranks = rank, num_ranks
        self._host, self._deadline = host, timedelta(seconds=deadline_s)
        self._store: Store | None = None

    def open_store(self) -> int:
        """Rank 0: listen on `host` only, on a free port, which is returned."""
        if self.num_ranks == 1:
            # Nobody else reads it: no socket at all.
            self._store = HashStore()
            return 0
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        listener.bind((self._host, 0))
        port = int(listener.getsockname()[1])
        # The store takes the listening socket over, and closes it.
        self._store = TCPStore(
            self._host, port, self.num_ranks, is_master=True, timeout=self._deadline, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        return port

    def connect(self, host: str, port: int, device: torch.device) -> DeviceMesh:
        """Join the group; returns once all ranks have. CPU tensors travel by gloo, CUDA tensors by NCCL."""
        if self._store is None:
            self._store = TCPStore(host, port, self.num_ranks, is_master=False, timeout=self._deadline)
        if host in ("127.0.0.1", "localhost", "::1"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=self._store, rank=self.rank, world_size=self.num_ranks, timeout=self._deadline,
            device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        return init_device_mesh(device.type, (self.num_ranks,), mesh_dim_names=("shard",))

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._store = None

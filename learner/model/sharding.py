"""What is asked of a model's tensors whether they are sharded, offloaded or neither."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on this rank; collective for a sharded one."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    home = tensor.device_mesh.device_type
    # Offloaded shards live on the CPU, their collectives on the accelerator.
    sharded = tensor.detach() if tensor.device.type == home else tensor.detach().to(home)
    assert isinstance(sharded, DTensor)
    return sharded.full_tensor()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor, an ordinary tensor itself; the same memory, without a gradient."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def device_of(model: nn.Module) -> torch.device:
    """Where `model` computes, which is not where its parameters are when they are offloaded to the host."""
    tensor = next(model.parameters())
    if isinstance(tensor, DTensor) and tensor.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device

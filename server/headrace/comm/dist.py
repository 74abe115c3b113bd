"""A group over `torch.distributed`: gloo on the CPU, NCCL on CUDA unless another is asked for."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.device import Device, Peers
from headrace.errors import GroupError


class DistComm:
    """Ranks that meet at an address and then talk through a process group."""

    recordable = False
    shared_bytes = 0

    def __init__(
        self,
        device: Device,
        rank: int,
        size: int,
        rendezvous: str,
        timeout_s: float,
        backend: str | None = None,
    ) -> None:
        """Waits for all ranks.

        Args:
            rendezvous: `host:port`; rank 0 listens there.
            timeout_s: how long to wait for the others, now and in every call.
            backend: the library; the device's own unless given. NCCL wants a GPU for each rank.
        """
        self.rank = rank
        self.size = size
        self._device = device.torch_device
        backend = backend or ("gloo" if device.kind == "cpu" else "nccl")
        try:
            dist.init_process_group(
                backend,
                init_method=f"tcp://{rendezvous}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device.torch_device if backend == "nccl" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise GroupError(
                f"rank {rank} of {size} could not join its group at {rendezvous}: {error}"
            ) from error

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim)

    def all_to_all(self, x: Tensor, counts: list[int]) -> Tensor:
        own = counts[self.rank]
        found = x.new_empty((self.size, own, *x.shape[1:]))
        dist.all_to_all_single(found.flatten(0, 1), x.contiguous(), [own] * self.size, list(counts))
        return found

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        dist.broadcast(x, src)
        return x

    def min_int(self, value: int) -> int:
        x = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(x, dist.ReduceOp.MIN)
        return int(x)

    def share(self, size: int) -> Peers | None:
        del size

    def reserve(self, numbers: int, dtype: torch.dtype) -> None:
        del numbers, dtype

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

"""A group whose GPUs write each other's memory: PyTorch's symmetric memory over NVLink or PCIe.

Sums of many numbers go through PyTorch's two-shot all-reduce, which can be recorded in a graph;
`share` is what kernels of our own build on. Everything else is the process group's.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.comm.base import Comm
from headrace.comm.dist import DistComm
from headrace.device import Device, Peers

log = logging.getLogger(__name__)

# The dtypes that the two-shot all-reduce sums; others are summed in float32.
SUMMED = (torch.bfloat16, torch.float32)
# What is asked for to see whether memory can be shared at all.
PROBE_BYTES = 4096


def share_memory(group: DistComm, device: Device) -> Comm:
    """The group with shared memory, or the group itself where some rank cannot share any."""
    why = ""
    made: SymmetricComm | None = None
    try:
        made = SymmetricComm(group, device)
        made.share(PROBE_BYTES)
    except (RuntimeError, ImportError) as error:
        why = (str(error).strip().splitlines() or ["no message"])[0]
    # One rank that cannot is enough: all ranks make the same calls.
    if group.min_int(0 if why else 1) == 0 or made is None:
        log.warning("sums go through NCCL, and no step is recorded: %s", why or "another rank")
        return group
    log.info("sums go through memory that the %d GPUs share", group.size)
    return made


class SymmetricComm:
    """See `Comm`."""

    recordable = True

    def __init__(self, group: DistComm, device: Device) -> None:
        self._group = group
        self.rank = group.rank
        self.size = group.size
        self.shared_bytes = 0
        self._device = device.torch_device
        self._name = dist.group.WORLD.group_name  # pyright: ignore[reportOptionalMemberAccess]
        self._stage: Tensor | None = None
        self.broadcast = group.broadcast
        self.all_gather = group.all_gather
        self.all_to_all = group.all_to_all
        self.min_int = group.min_int

    def all_reduce(self, x: Tensor) -> Tensor:
        """By way of the memory that was reserved; sums without room there go through NCCL."""
        stage = self._stage
        if stage is None or x.numel() > stage.numel():
            return self._group.all_reduce(x)
        part = stage[: x.numel()]
        part.copy_(x.reshape(-1))
        torch.ops.symm_mem.two_shot_all_reduce_(part, "sum", self._name)
        summed = part.view(x.shape)
        return summed if summed.dtype == x.dtype else x.copy_(summed)

    def share(self, size: int) -> Peers | None:
        from torch.distributed import _symmetric_memory as symmetric

        memory = symmetric.empty(size, dtype=torch.uint8, device=self._device)
        handle = symmetric.rendezvous(memory, self._name)
        addresses = list(handle.buffer_ptrs)
        assert addresses[self.rank] == memory.data_ptr(), "an allocation of its own"
        memory.zero_()
        # Nobody writes before everybody has zeroed: this is behind it on the stream, and waits.
        self.min_int(0)
        self.shared_bytes += size
        address_R = torch.tensor(addresses, dtype=torch.int64, device=self._device)
        return Peers(self.rank, self.size, memory, address_R)

    def reserve(self, numbers: int, dtype: torch.dtype) -> None:
        dtype = dtype if dtype in SUMMED else torch.float32
        if self._stage is None or self._stage.numel() < numbers or self._stage.dtype != dtype:
            if self._stage is not None:
                self.shared_bytes -= self._stage.nbytes
                self._stage = None
            peers = self.share(numbers * dtype.itemsize)
            assert peers is not None
            self._stage = peers.memory.view(dtype)

    def close(self) -> None:
        self._group.close()

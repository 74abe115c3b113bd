"""One CUDA device. Copies go through pinned memory; everything runs on the current stream."""

import numpy as np
import torch
from torch import Tensor

from headrace.device.base import Download, DtypeChoice

# Share of the free memory the KV pool takes when nobody says otherwise.
KV_SHARE_DEFAULT = 0.9

# First compute capability that multiplies bfloat16.
BF16_CAPABILITY = (8, 0)


class CudaDevice:
    """The CUDA device with one index."""

    kind = "cuda"
    asynchronous = True
    threads = 1

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name = f"cuda:{index} ({torch.cuda.get_device_name(index)})"

    @staticmethod
    def missing(index: int) -> str | None:
        """Why the device cannot be used, or None."""
        if not torch.backends.cuda.is_built():
            return "this PyTorch was built without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        count = torch.cuda.device_count()
        if index >= count:
            return f"device {index} is not one of the {count} visible CUDA devices"
        return None

    def start(self) -> None:
        """Makes the device current in the calling thread."""
        torch.cuda.set_device(self.torch_device)

    def free_bytes(self) -> int:
        """What the driver says is free, and what torch has cached but does not use."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device)
        return free + cached - torch.cuda.memory_allocated(self.torch_device)

    def kv_budget(self, fraction: float, bytes_max: int, ranks: int) -> int:
        """A share of the free memory; every rank has a device of its own."""
        del ranks
        share = fraction if fraction > 0 else KV_SHARE_DEFAULT
        budget = int(self.free_bytes() * share)
        return min(budget, bytes_max) if bytes_max > 0 else budget

    def default_dtype(self, checkpoint: torch.dtype) -> DtypeChoice:
        """The checkpoint's own 16-bit dtype, or bfloat16; float16 on devices without it."""
        stored = str(checkpoint).removeprefix("torch.")
        if torch.cuda.get_device_capability(self.torch_device) < BF16_CAPABILITY:
            return DtypeChoice(torch.float16, f"the device has no bfloat16 (checkpoint: {stored})")
        dtype = torch.float16 if checkpoint == torch.float16 else torch.bfloat16
        return DtypeChoice(dtype, f"the checkpoint is stored in {stored}")

    def host_buffer(self, length: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory."""
        return torch.zeros(length, dtype=dtype, pin_memory=True)

    def upload(self, host: Tensor) -> Tensor:
        """Copies without waiting."""
        return host.to(self.torch_device, non_blocking=True)

    def download(self, tensors: list[Tensor]) -> Download:
        """Copies to pinned memory without waiting, and marks the end with an event."""
        hosts = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        event = torch.cuda.Event()
        event.record()
        return _Copying(hosts, event)


class _Copying:
    """Copies that end when their event does."""

    def __init__(self, hosts: list[Tensor], event: torch.cuda.Event) -> None:
        self._hosts = hosts
        self._event = event

    def wait(self) -> list[np.ndarray]:
        self._event.synchronize()
        return [host.numpy() for host in self._hosts]

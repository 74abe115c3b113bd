"""What the rest of the shard may ask of a device."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Download(Protocol):
    """A copy to the host that has been started."""

    def wait(self) -> list[np.ndarray]:
        """Waits until the copy is complete; returns the arrays, in the order they were given."""
        ...


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype and the reason for it, as the startup log tells it."""

    dtype: torch.dtype
    why: str


class Device(Protocol):
    """Memory, precision and copies of one device.

    Attributes:
        kind: `cpu` or `cuda`.
        name: what the startup log and `Describe` call it.
        torch_device: where tensors are made.
        asynchronous: a launch returns before its work is done, so that the next one can be
            made in the meantime; where it is false a result is ready when its launch returns.
        threads: threads an operation may use.
    """

    kind: str
    name: str
    torch_device: torch.device
    asynchronous: bool
    threads: int

    def start(self) -> None:
        """Claims the device for the calling thread; called once, by the thread that owns it."""
        ...

    def free_bytes(self) -> int:
        """Bytes this process could still allocate on the device."""
        ...

    def kv_budget(self, fraction: float, bytes_max: int, ranks: int) -> int:
        """Bytes the KV pool of this rank may take (R9).

        Args:
            fraction: of the free memory; 0 for the device's default.
            bytes_max: upper bound; 0 for the device's default.
            ranks: ranks of the group, which may share the memory.
        """
        ...

    def default_dtype(self, checkpoint: torch.dtype) -> DtypeChoice:
        """The dtype that `auto` means here for a checkpoint stored in `checkpoint`."""
        ...

    def host_buffer(self, length: int, dtype: torch.dtype) -> Tensor:
        """A host tensor that copies to the device fast (pinned, where that exists)."""
        ...

    def upload(self, host: Tensor) -> Tensor:
        """Starts a copy of a host buffer to the device; the buffer must outlive the step."""
        ...

    def download(self, tensors: list[Tensor]) -> Download:
        """Starts copies of tensors to the host, after the work launched so far."""
        ...

"""What the rest of the shard may ask of a device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.device.weights import WeightStager
from headrace.memory import Room


class Download(Protocol):
    """A copy to the host that has been started."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        ...

    def wait(self) -> list[np.ndarray]:
        """Waits until the copy is complete; returns the arrays, in the order they were given."""
        ...


class Staging(Protocol):
    """Where a step's columns are written on the host, to reach the device in one copy."""

    def host(self, step: int) -> np.ndarray:
        """The bytes that a step may fill; what an earlier step wrote there has been sent."""
        ...

    def send(self, step: int, used: int) -> Tensor:
        """Starts the copy of the first `used` bytes; returns them on the device, uint8.

        They stay as they are until the next `send`. The address is the same for every step where
        the device records graphs.
        """
        ...

    def inbox(self) -> Tensor:
        """All bytes that `send` fills, uint8, on the device; for graphs to be recorded with."""
        ...


class Graph(Protocol):
    """Recorded launches."""

    def replay(self) -> None:
        """Launches them again, reading and writing the memory they were recorded with."""
        ...


class Recorder(Protocol):
    """Records launches between `begin` and `end`, without running them; used again and again."""

    def begin(self) -> None: ...

    def end(self) -> Graph: ...


class Timer(Protocol):
    """Measures how long the device is busy with what is launched between start and stop."""

    def stop(self) -> None:
        """Marks the end of what is measured."""
        ...

    def micros(self) -> int:
        """Microseconds; call it when the work is known to be complete."""
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
        capability: the compute capability of a CUDA device; (0, 0) elsewhere.
        multiprocessors: of a CUDA device; 0 elsewhere.
        graphs: launches can be recorded, and replayed in one call.
        reserve_bytes: what is left free beside the pool: libraries that load code at a first call,
            and the gaps that an allocator leaves.
    """

    kind: str
    name: str
    torch_device: torch.device
    asynchronous: bool
    threads: int
    capability: tuple[int, int]
    multiprocessors: int
    graphs: bool
    reserve_bytes: int

    def start(self) -> None:
        """Claims the device for the calling thread; called once, by the thread that owns it."""
        ...

    def room(self) -> Room:
        """The device's memory, as the driver counts it."""
        ...

    def trim(self) -> None:
        """Gives back what is kept for reuse but not used, graphs that are gone included."""
        ...

    def kv_budget(self, fraction: float, bytes_max: int, ranks: int) -> int:
        """Bytes the KV pool of this rank may take at most; more than there are means all (R9).

        Args:
            fraction: of the free memory on the CPU; of all memory, in use in the end, elsewhere.
                0 is the device's default.
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

    def to_device(self, array: np.ndarray) -> Tensor:
        """Starts a copy of an array to the device, without waiting; the array may change after."""
        ...

    def staging(self, size: int, stages: int) -> Staging:
        """Makes buffers of `size` bytes for the columns of `stages` steps in a row."""
        ...

    def download(self, tensors: list[Tensor]) -> Download:
        """Starts copies of tensors to the host, after the work launched so far.

        The tensors may be freed, but nothing launched afterwards may overwrite them.
        """
        ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records what `work` launches, without running it; only where `graphs`.

        All recordings share one pool of memory, which they keep: what one of them allocates may be
        where an earlier one's temporaries were, so that two never run at the same time.
        """
        ...

    def recorder(self) -> Recorder:
        """Makes a recorder, for work that is recorded in parts; only where `graphs`."""
        ...

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory as a tensor that does not keep it: recordings may reuse it for others."""
        ...

    def timer(self) -> Timer:
        """Starts a measurement."""
        ...

    def weight_stager(self, buffer_bytes: int, buffers: int) -> WeightStager:
        """Makes host buffers through which weights are copied to the device."""
        ...

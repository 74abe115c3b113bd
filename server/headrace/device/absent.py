"""A CUDA device that is not there: tensors have shapes, dtypes and aligned addresses, no memory.

What is launched on it is known by its arguments alone, which is enough to compile it. An address
is the distance from the beginning of its allocation, so it is aligned as on a device, whose
allocations begin at multiples of 512 bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from headrace.device.base import Download, DtypeChoice, Graph, Recorder, Staging, Timer
from headrace.device.weights import WeightStager
from headrace.memory import Room

# More than any model of one device needs, and none of it exists.
ROOM = Room(total=1 << 40, free=1 << 40)


class AbsentDevice:
    """See `Device`. Nothing computes; results are zeros."""

    kind = "cuda"
    torch_device = torch.device("meta")
    asynchronous = True
    threads = 1
    graphs = True
    reserve_bytes = 0

    def __init__(self, capability: tuple[int, int], multiprocessors: int) -> None:
        self.name = "no device, of compute capability {}.{}".format(*capability)
        self.capability = capability
        self.multiprocessors = multiprocessors

    def start(self) -> None:
        pass

    def room(self) -> Room:
        return ROOM

    def trim(self) -> None:
        pass

    def kv_budget(self, fraction: float, bytes_max: int, ranks: int) -> int:
        del fraction, bytes_max, ranks
        return ROOM.free

    def default_dtype(self, checkpoint: torch.dtype) -> DtypeChoice:
        """As on a device that multiplies bfloat16."""
        dtype = torch.float16 if checkpoint == torch.float16 else torch.bfloat16
        return DtypeChoice(dtype, "as the checkpoint")

    def host_buffer(self, length: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(length, dtype=dtype)

    def upload(self, host: Tensor) -> Tensor:
        return host.to(self.torch_device)

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.torch_device)

    def staging(self, size: int, stages: int) -> Staging:
        del stages
        return _Nowhere(size)

    def download(self, tensors: list[Tensor]) -> Download:
        return _Zeros(tensors)

    def capture(self, work: Callable[[], None]) -> Graph:
        work()
        return _Nothing()

    def recorder(self) -> Recorder:
        return _Nothing()

    def alias(self, tensor: Tensor) -> Tensor:
        return tensor

    def timer(self) -> Timer:
        return _Nothing()

    def weight_stager(self, buffer_bytes: int, buffers: int) -> WeightStager:
        raise AssertionError("no weights are read for a device that is not there")


class _Nowhere:
    """Staging that is sent nowhere."""

    def __init__(self, size: int) -> None:
        self._host = np.zeros(size, np.uint8)
        self._inbox = torch.zeros(size, dtype=torch.uint8, device=AbsentDevice.torch_device)

    def host(self, step: int) -> np.ndarray:
        del step
        return self._host

    def send(self, step: int, used: int) -> Tensor:
        del step
        return self._inbox[:used]

    def inbox(self) -> Tensor:
        return self._inbox


class _Zeros:
    """What a download of tensors without memory brings."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]

    def done(self) -> bool:
        return True

    def wait(self) -> list[np.ndarray]:
        return [torch.zeros(shape, dtype=dtype).numpy() for shape, dtype in self._shapes]


class _Nothing:
    """A graph that is empty, a recorder of such graphs, a timer of nothing."""

    def begin(self) -> None:
        pass

    def end(self) -> Graph:
        return self

    def replay(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def micros(self) -> int:
        return 0

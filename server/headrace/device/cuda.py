"""One CUDA device: a stream that computes, one that copies results, graphs in one pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.device.base import Download, DtypeChoice, Graph, Recorder, Staging, Timer
from headrace.device.cuda_weights import PinnedStager
from headrace.device.weights import WeightStager
from headrace.memory import Room

# Left free beside the pool: kernels that libraries load at their first call, communication buffers,
# and what an allocator cannot use of its segments.
RESERVE_BYTES = 1 << 30

# First compute capability that multiplies bfloat16.
BF16_CAPABILITY = (8, 0)


class CudaDevice:
    """The CUDA device with one index."""

    kind = "cuda"
    asynchronous = True
    threads = 1
    graphs = True
    reserve_bytes = RESERVE_BYTES

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.name = f"cuda:{index} ({properties.name})"
        self.capability = (properties.major, properties.minor)
        self.multiprocessors = properties.multi_processor_count
        self._side: torch.cuda.Stream | None = None
        self._graph_pool: Any = None

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
        """Makes the device current in the calling thread, and a stream that can be recorded."""
        torch.cuda.set_device(self.torch_device)
        torch.cuda.set_stream(torch.cuda.Stream(self.torch_device))
        self._side = torch.cuda.Stream(self.torch_device)

    def room(self) -> Room:
        """What the driver says."""
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return Room(total, free)

    def trim(self) -> None:
        """Empties torch's cache; graphs recorded from now on share a new pool."""
        self._graph_pool = None
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()

    def kv_budget(self, fraction: float, bytes_max: int, ranks: int) -> int:
        """All that is free, unless told; every rank has a device of its own."""
        del ranks
        room = self.room()
        budget = room.free
        if fraction > 0:
            budget = max(0, int(room.total * fraction) - (room.total - room.free))
        return min(budget, bytes_max) if bytes_max > 0 else budget

    def default_dtype(self, checkpoint: torch.dtype) -> DtypeChoice:
        """The checkpoint's own 16-bit dtype, or bfloat16; float16 on devices without it."""
        stored = str(checkpoint).removeprefix("torch.")
        if self.capability < BF16_CAPABILITY:
            return DtypeChoice(torch.float16, f"the device has no bfloat16 (checkpoint: {stored})")
        dtype = torch.float16 if checkpoint == torch.float16 else torch.bfloat16
        return DtypeChoice(dtype, f"the checkpoint is stored in {stored}")

    def host_buffer(self, length: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory."""
        return torch.zeros(length, dtype=dtype, pin_memory=True)

    def upload(self, host: Tensor) -> Tensor:
        """Copies without waiting."""
        return host.to(self.torch_device, non_blocking=True)

    def to_device(self, array: np.ndarray) -> Tensor:
        """Copies by way of pinned memory, which torch keeps until the copy is done."""
        pinned = torch.empty(array.shape, dtype=_TORCH[array.dtype.type], pin_memory=True)
        pinned.numpy()[...] = array
        return pinned.to(self.torch_device, non_blocking=True)

    def staging(self, size: int, stages: int) -> Staging:
        """Pinned buffers in turn, and one place on the device that all are copied to."""
        return _PinnedStaging(self.torch_device, size, stages)

    def download(self, tensors: list[Tensor]) -> Download:
        """Copies to pinned memory on a stream of its own."""
        assert self._side is not None, "used before start()"
        self._side.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(self._side):
            hosts = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                    tensor, non_blocking=True
                )
                for tensor in tensors
            ]
            event = torch.cuda.Event()
            event.record()
        for tensor in tensors:
            tensor.record_stream(self._side)  # Its memory is not given away before it is read.
        return _Copying(hosts, event)

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `recorder`."""
        recorder = self.recorder()
        recorder.begin()
        work()
        return recorder.end()

    def alias(self, tensor: Tensor) -> Tensor:
        """By way of the array interface, which knows no 16-bit floats."""
        words = tensor.view(_WORDS[tensor.dtype.itemsize])
        made = torch.as_tensor(_Array(words), device=self.torch_device)
        assert made.data_ptr() == tensor.data_ptr(), "an alias is no copy"
        return made.view(tensor.dtype)

    def recorder(self) -> Recorder:
        """Records on the current stream, into the pool that all graphs of the device share."""
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        return _Recorder(self._graph_pool)

    def timer(self) -> Timer:
        """Between two events on the stream: waiting for earlier steps does not count."""
        return _EventTimer()

    def weight_stager(self, buffer_bytes: int, buffers: int) -> WeightStager:
        """Pinned memory, and a stream of its own."""
        return PinnedStager(self.torch_device, buffer_bytes, buffers)


_TORCH = {
    np.int64: torch.int64,
    np.int32: torch.int32,
    np.float64: torch.float64,
    np.float32: torch.float32,
    np.uint8: torch.uint8,
    np.bool_: torch.bool,
}


class _PinnedStaging:
    """The stream orders the copies: one is made when nothing launched before it is left to run."""

    def __init__(self, device: torch.device, size: int, stages: int) -> None:
        self._buffers = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(stages)
        ]
        self._arrays = [buffer.numpy() for buffer in self._buffers]
        self._inbox = torch.zeros(size, dtype=torch.uint8, device=device)

    def host(self, step: int) -> np.ndarray:
        return self._arrays[step % len(self._arrays)]

    def send(self, step: int, used: int) -> Tensor:
        sent = self._inbox[:used]
        sent.copy_(self._buffers[step % len(self._buffers)][:used], non_blocking=True)
        return sent

    def inbox(self) -> Tensor:
        return self._inbox


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Array:
    """The array interface of a tensor, and nothing that keeps its memory."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.dtype.itemsize
        self.__cuda_array_interface__ = {
            "version": 2,
            "typestr": f"<i{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "data": (tensor.data_ptr(), False),
        }


class _Recorder:
    """CUDA graphs in one memory pool."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the process may go on calling the driver.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        assert self._graph is not None, "ended before it was begun"
        graph, self._graph = self._graph, None
        graph.capture_end()
        return graph


class _Copying:
    """Copies that end when their event does."""

    def __init__(self, hosts: list[Tensor], event: torch.cuda.Event) -> None:
        self._hosts = hosts
        self._event = event

    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> list[np.ndarray]:
        self._event.synchronize()
        return [host.numpy() for host in self._hosts]


class _EventTimer:
    """Two events that record the device's clock."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def stop(self) -> None:
        self._end.record()

    def micros(self) -> int:
        self._end.synchronize()
        return int(1000 * self._begin.elapsed_time(self._end))

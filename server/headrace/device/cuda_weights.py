"""Weights to a CUDA device: pinned buffers, one stream that copies, an event a buffer."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headrace.device.weights import WeightBuffer


class _PinnedBuffer:
    """Memory that the device's copy engine reads by itself."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.array = self.tensor.numpy()
        self.copied = torch.cuda.Event()


class PinnedStager:
    """See `WeightStager`. Buffers are pinned when they are first taken, which takes time."""

    def __init__(self, device: torch.device, buffer_bytes: int, buffers: int) -> None:
        self._device = device
        self._size = buffer_bytes
        self._stream = torch.cuda.Stream(device)
        # Memory that the caller has just been given may still be in use by what it launched.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        # In the order in which copies were launched, so that the first is the first to be idle.
        self._idle: queue.SimpleQueue[_PinnedBuffer | None] = queue.SimpleQueue()
        for _ in range(buffers):
            self._idle.put(None)

    def take(self) -> WeightBuffer:
        buffer = self._idle.get()
        if buffer is None:
            # A new thread is at device 0, where pinning would make a context for nothing.
            with torch.cuda.device(self._device):
                return _PinnedBuffer(self._size)
        buffer.copied.synchronize()
        return buffer

    @contextmanager
    def copying(self, buffer: WeightBuffer) -> Iterator[None]:
        assert isinstance(buffer, _PinnedBuffer), "a buffer of another stager"
        try:
            with torch.cuda.stream(self._stream):
                yield
                buffer.copied.record()
        finally:
            self._idle.put(buffer)

    def to_device(self, host: Tensor) -> Tensor:
        return host.to(self._device, non_blocking=True)

    def finish(self) -> None:
        self._stream.synchronize()
        while not self._idle.empty():
            self._idle.get()
        give_back = getattr(torch.accelerator, "empty_host_cache", None)  # From PyTorch 2.12 on.
        if give_back is not None:
            give_back()

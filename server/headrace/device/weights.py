"""How weights reach a device: host buffers, of which some are filled while others are copied."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class WeightBuffer(Protocol):
    """Host memory, seen as an array to read a file into and as a tensor to copy from.

    Attributes:
        array: uint8.
        tensor: the same bytes.
    """

    array: np.ndarray
    tensor: Tensor


class WeightStager(Protocol):
    """A bounded ring of buffers. Its methods may be called by several threads at once."""

    def take(self) -> WeightBuffer:
        """A buffer that nothing reads any more; waits until there is one."""
        ...

    def copying(self, buffer: WeightBuffer) -> AbstractContextManager[None]:
        """Within it, copies from the buffer are launched; then the buffer is given back."""
        ...

    def to_device(self, host: Tensor) -> Tensor:
        """Starts a copy of a part of the buffer to new memory; only within `copying`.

        The result lives until the work launched within `copying` is done.
        """
        ...

    def finish(self) -> None:
        """Waits until every copy is done, and gives the buffers back to the system."""
        ...


class HostBuffer:
    """Plain memory."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8)
        self.array = self.tensor.numpy()


class HostStager:
    """For a device that is the host: a copy is done when it returns."""

    def __init__(self, buffer_bytes: int, buffers: int) -> None:
        self._size = buffer_bytes
        # None: not made yet.
        self._idle: queue.SimpleQueue[WeightBuffer | None] = queue.SimpleQueue()
        for _ in range(buffers):
            self._idle.put(None)

    def take(self) -> WeightBuffer:
        return self._idle.get() or HostBuffer(self._size)

    @contextmanager
    def copying(self, buffer: WeightBuffer) -> Iterator[None]:
        try:
            yield
        finally:
            self._idle.put(buffer)

    def to_device(self, host: Tensor) -> Tensor:
        return host

    def finish(self) -> None:
        while not self._idle.empty():
            self._idle.get()

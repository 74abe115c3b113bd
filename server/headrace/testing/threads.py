"""A tensor-parallel group whose ranks are threads of one process: quick to start, for tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from headrace.device import Peers

T = TypeVar("T")


class _Meeting:
    """Where the ranks lay down their tensors and pick up the others'."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.laid: list[Tensor] = [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.laid[rank] = x.clone()
        self.barrier.wait()
        picked = list(self.laid)
        self.barrier.wait()
        return picked


class ThreadComm:
    """One rank's end; sums go in rank order, so that their bits are equal on every rank."""

    recordable = False
    shared_bytes = 0

    def __init__(self, meeting: _Meeting, rank: int, size: int) -> None:
        self._meeting = meeting
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self._meeting.exchange(self.rank, x)).sum(0))

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return torch.cat(self._meeting.exchange(self.rank, x), dim)

    def all_to_all(self, x: Tensor, counts: list[int]) -> Tensor:
        first = sum(counts[: self.rank])
        others = self._meeting.exchange(self.rank, x)
        return torch.stack([other[first : first + counts[self.rank]] for other in others])

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        return x.copy_(self._meeting.exchange(self.rank, x)[src])

    def min_int(self, value: int) -> int:
        return min(int(x) for x in self._meeting.exchange(self.rank, torch.tensor(value)))

    def share(self, size: int) -> Peers | None:
        del size

    def reserve(self, numbers: int, dtype: torch.dtype) -> None:
        del numbers, dtype

    def close(self) -> None:
        pass


def group(size: int) -> list[ThreadComm]:
    """Makes the ends of all ranks; each belongs to a thread of its own."""
    meeting = _Meeting(size)
    return [ThreadComm(meeting, rank, size) for rank in range(size)]


def run_ranks(size: int, work: Callable[[ThreadComm], T]) -> list[T]:
    """Runs `work` once a rank; returns the results in rank order, or raises the first error."""
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, comm) for comm in group(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            # Ranks that waited for the one that failed say less than it does.
            told = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
            raise (told or errors)[0]
        return [future.result() for future in futures]

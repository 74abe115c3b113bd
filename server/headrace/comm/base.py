"""What ranks of a tensor-parallel group say to each other."""

from typing import Protocol

import torch
from torch import Tensor

from headrace.device import Peers


class Comm(Protocol):
    """The group, seen from one of its ranks. All ranks make the same calls in the same order.

    Attributes:
        rank: this process's number in the group.
        size: ranks in the group.
        recordable: whether graphs can be recorded of `all_reduce` and of what writes shared memory.
        shared_bytes: of the device, what `share` and `reserve` have taken.
    """

    rank: int
    size: int
    recordable: bool
    shared_bytes: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums `x` over the ranks. The bits are equal on every rank.

        Returns: `x` itself, overwritten, or memory that the next sum overwrites.
        """
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors, of one shape, side by side along `dim`, in rank order."""
        ...

    def all_to_all(self, x: Tensor, counts: list[int]) -> Tensor:
        """Gives each rank its rows: of `x` the first `counts[0]` are rank 0's, and so on.

        Returns: [ranks, own rows, …], what each rank had for this one.
        """
        ...

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Overwrites `x` by rank `src`'s, in place; returns it."""
        ...

    def min_int(self, value: int) -> int:
        """The smallest of the ranks' values."""
        ...

    def share(self, size: int) -> Peers | None:
        """Makes zeroed memory of `size` bytes on every rank; None where ranks cannot share any."""
        ...

    def reserve(self, numbers: int, dtype: torch.dtype) -> None:
        """Makes room for sums of so many numbers: before any is recorded, and again for more."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...

"""What ranks of a tensor-parallel group say to each other."""

from typing import Protocol

from torch import Tensor


class Comm(Protocol):
    """The group, seen from one of its ranks. All ranks make the same calls in the same order.

    Attributes:
        rank: this process's number in the group.
        size: ranks in the group.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums `x` over the ranks, in place; returns it. The bits are equal on every rank."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors, of one shape, side by side along `dim`, in rank order."""
        ...

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Overwrites `x` by rank `src`'s, in place; returns it."""
        ...

    def min_int(self, value: int) -> int:
        """The smallest of the ranks' values."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...

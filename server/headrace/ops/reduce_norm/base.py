"""What an implementation of the operation makes."""

# T tokens · D width

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from headrace.device.peers import Share


class ReduceNorm(Protocol):
    """Sums over the ranks, adds to the residual stream, and normalises.

    Attributes:
        rows_max: tokens at most.
    """

    rows_max: int

    def __call__(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x_TD: what this rank adds; left as it is.
            residual_TD: overwritten with the stream; None where that begins with the sum.

        Returns: the norm of the stream, new, and the stream; their bits are equal on every rank.
        """
        ...


class MakeReduceNorm(Protocol):
    """What `ops.select` builds: memory that ranks share is known only to the layers."""

    def __call__(self, share: Share, ranks: int, width: int) -> ReduceNorm | None:
        """Makes the operation for streams of one width, once for all layers.

        All ranks call it in the same order. None where sum and norm are two operations.
        """
        ...

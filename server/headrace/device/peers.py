"""Memory of several devices that each of them can write."""

# R ranks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """One piece of memory on each rank's device, zeroed when it was made; seen from one rank.

    Attributes:
        rank: whose `memory` this is.
        size: ranks.
        memory: this rank's piece, uint8; aligned to 16 bytes at least.
        address_R: where each rank's piece is in this rank's address space, int64, on the device.
    """

    rank: int
    size: int
    memory: Tensor
    address_R: Tensor


# Makes memory of so many bytes on every rank: a call that all ranks make, in the same order. None
# where devices cannot write each other's memory.
Share = Callable[[int], Peers | None]

"""A place in a group that does not exist."""

import torch
from torch import Tensor

from headrace.comm.single import SingleComm
from headrace.device import Peers


class Place(SingleComm):
    """A rank among others, for an outline of a model that is never computed."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Of the shape that it has in a group."""
        return torch.cat([x] * self.size, dim)

    def all_to_all(self, x: Tensor, counts: list[int]) -> Tensor:
        """Of the shape that it has in a group."""
        return x.new_empty((self.size, counts[self.rank], *x.shape[1:]))

    def share(self, size: int) -> Peers | None:
        """Memory that is nowhere."""
        nowhere = torch.empty(size, dtype=torch.uint8, device="meta")
        address_R = torch.empty(self.size, dtype=torch.int64, device="meta")
        return Peers(self.rank, self.size, nowhere, address_R)

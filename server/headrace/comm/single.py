"""A group of one."""

from torch import Tensor


class SingleComm:
    """Nobody to talk to: everything is already as it should be."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        del dim
        return x

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        del src
        return x

    def min_int(self, value: int) -> int:
        return value

    def close(self) -> None:
        pass

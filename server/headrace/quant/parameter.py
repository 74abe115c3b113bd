"""What a parameter is before it has a value: its shape, and its share of the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """This rank's range of one checkpoint tensor, along the dimension that is split."""

    full: int  # size of that dimension in the checkpoint
    start: int
    stop: int  # may lie beyond `full`: the rest is zeros

    @property
    def size(self) -> int:
        return self.stop - self.start

    @classmethod
    def whole(cls, full: int) -> Part:
        return cls(full, 0, full)


@dataclass(frozen=True)
class Split:
    """How a parameter is put together: its parts, one after the other along `dim`.

    A fused parameter has a part for each checkpoint tensor that it is made of.
    """

    dim: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


class Declares(nn.Module):
    """A module whose parameters know their `Split`; built on `meta`, filled by `weights.load`."""

    def __init__(self) -> None:
        super().__init__()
        self.splits: dict[str, Split] = {}

    def declare(self, name: str, split: Split, other: int | None, dtype: torch.dtype) -> None:
        """Registers a parameter: `other` is the size of the dimension that is not split."""
        shape = [split.size] if other is None else [other, other]
        shape[split.dim] = split.size
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.splits[name] = split

    def take(self, name: str) -> torch.Tensor | None:
        """Removes a parameter and returns its tensor, so that packing it frees the original."""
        value = self._parameters.pop(name, None)
        self.splits.pop(name, None)
        return None if value is None else value.data

    def finish(self) -> None:
        """Called once, when every parameter has its value; the place to pack weights."""

"""What a model wants of a checkpoint: one tensor for parameters that are the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.errors import CheckpointError
from headrace.quant import Declares, Split
from headrace.weights.names import Names

# How many names an error lists before it says how many more there are.
_NAMED = 5


@dataclass(frozen=True)
class Piece:
    """A range of one checkpoint tensor and where it goes: both along the split's dimension."""

    source: str
    full: tuple[int, ...]  # the shape of the whole checkpoint tensor
    start: int
    stop: int  # not beyond what the checkpoint has
    at: int


@dataclass(frozen=True)
class Want:
    """One tensor of this rank, and the parameters that it becomes: two if the head is tied."""

    parameters: tuple[str, ...]
    sources: tuple[str, ...]
    split: Split
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Piece]:
        """The ranges that it is put together from, in order."""
        at = 0
        for source, part in zip(self.sources, self.split.parts, strict=True):
            full = list(self.shape)
            full[self.split.dim] = part.full
            stop = min(part.stop, part.full)
            if stop > part.start:
                yield Piece(source, tuple(full), part.start, stop, at)
            at += part.size

    def padding(self) -> Iterator[tuple[int, int]]:
        """Where it has rows (or columns) that no checkpoint tensor has: start and length."""
        at = 0
        for part in self.split.parts:
            there = max(min(part.stop, part.full) - part.start, 0)
            if there < part.size:
                yield at + there, part.size - there
            at += part.size

    def zero_padding(self, value: Tensor) -> None:
        """Zeroes what no checkpoint tensor fills."""
        for at, length in self.padding():
            value.narrow(self.split.dim, at, length).zero_()


def list_wants(model: nn.Module, names: Names) -> list[Want]:
    """Returns what a model built on `meta` wants, in the order of its parameters."""
    shapes = dict(model.named_parameters())
    together: dict[tuple[tuple[str, ...], Split], list[str]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Declares):
            for name, split in module.splits.items():
                parameter = f"{prefix}.{name}"
                together.setdefault((names.sources(parameter), split), []).append(parameter)
    return [
        Want(tuple(parameters), sources, split, tuple(like.shape), like.dtype)
        for (sources, split), parameters in together.items()
        for like in [shapes[parameters[0]]]
    ]


def check_coverage(wants: list[Want], names: Names, held: set[str]) -> None:
    """Refuses a checkpoint that lacks a tensor or holds one that nobody reads."""
    wanted = {source for want in wants for source in want.sources}
    missing = sorted(wanted - held)
    unused = sorted(name for name in held - wanted if not names.is_ignorable(name))
    problems: list[str] = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({_list(missing)})")
    if unused:
        problems.append(f"{len(unused)} tensors are not used ({_list(unused)})")
    if problems:
        raise CheckpointError("the checkpoint does not fit its config: " + " and ".join(problems))


def _list(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

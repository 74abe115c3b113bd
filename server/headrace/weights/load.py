"""Filling a decoder's parameters: every one found, every tensor used, each rank its slice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.errors import CheckpointError
from headrace.quant import Declares, Split
from headrace.weights.names import Names
from headrace.weights.reader import Reader

# How many names an error lists before it says how many more there are.
_NAMED = 5


def load(model: nn.Module, names: Names, reader: Reader, device: torch.device) -> None:
    """Reads, slices and assigns the parameters of a model built on `meta`, then lets it pack them.

    Missing and unused tensors, and wrong shapes, are a CheckpointError that names them.
    """
    splits = {
        f"{prefix}.{name}": split
        for prefix, module in model.named_modules()
        if isinstance(module, Declares)
        for name, split in module.splits.items()
    }
    sources = {parameter: names.sources(parameter) for parameter in splits}
    _check_coverage(sources, names, reader)
    shapes = dict(model.named_parameters())
    # Parameters of one source and one share are one tensor: a tied head is not read twice.
    read: dict[tuple[tuple[str, ...], Split], Tensor] = {}
    state: dict[str, Tensor] = {}
    for parameter, split in splits.items():
        key = (sources[parameter], split)
        if key not in read:
            value = _assemble(reader, sources[parameter], split, shapes[parameter])
            read[key] = value.to(device)
        state[parameter] = read[key]
    read.clear()
    model.load_state_dict(state, assign=True)
    state.clear()
    model.to(device)
    for module in model.modules():
        if isinstance(module, Declares):
            module.finish()


def _assemble(reader: Reader, sources: tuple[str, ...], split: Split, like: nn.Parameter) -> Tensor:
    """Returns this rank's value of a parameter: its parts of the sources, in the model's dtype."""
    value = torch.empty(like.shape, dtype=like.dtype)
    at = 0
    for source, part in zip(sources, split.parts, strict=True):
        full = list(like.shape)
        full[split.dim] = part.full
        into = value.narrow(split.dim, at, part.size)
        stop = min(part.stop, part.full)
        there = max(stop - part.start, 0)
        if there > 0:
            read = reader.read(source, tuple(full), split.dim, part.start, stop)
            into.narrow(split.dim, 0, there).copy_(read)
        # What lies beyond the checkpoint's tensor is padding.
        into.narrow(split.dim, there, part.size - there).zero_()
        at += part.size
    return value


def _check_coverage(sources: dict[str, tuple[str, ...]], names: Names, reader: Reader) -> None:
    """Refuses a checkpoint that lacks a tensor or holds one that nobody reads."""
    held = reader.names()
    if held is None:
        return
    wanted = {source for group in sources.values() for source in group}
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

"""Filling a decoder's parameters: every one found, every tensor used, each rank its slice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headrace.quant import Declares
from headrace.weights.checkpoint import check_fit
from headrace.weights.names import Names
from headrace.weights.reader import Reader
from headrace.weights.want import Want, check_coverage


def read_wants(wants: list[Want], names: Names, reader: Reader) -> list[Tensor]:
    """Reads and slices on the host, one tensor after the other; the plain twin of `Loading`.

    Missing and unused tensors, wrong shapes and dtypes are a CheckpointError that names them.
    """
    held = reader.names()
    if held is not None:
        check_coverage(wants, names, held)
    return [_assemble(reader, want) for want in wants]


def assign(model: nn.Module, wants: list[Want], values: list[Tensor]) -> None:
    """Makes values, which lie on the device, the parameters of a model built on `meta`."""
    state = {
        parameter: value
        for want, value in zip(wants, values, strict=True)
        for parameter in want.parameters
    }
    model.load_state_dict(state, assign=True)


def pack(model: nn.Module, device: torch.device) -> None:
    """Lets every module pack its weights, and takes along the buffers that no checkpoint has."""
    model.to(device)
    for module in model.modules():
        if isinstance(module, Declares):
            module.finish()


def _assemble(reader: Reader, want: Want) -> Tensor:
    value = torch.empty(want.shape, dtype=want.dtype)
    for piece in want.pieces():
        into = value.narrow(want.split.dim, piece.at, piece.stop - piece.start)
        read = reader.read(piece.source, piece.full, want.split.dim, piece.start, piece.stop)
        shape = tuple(read.shape)  # The reader has compared the shape of the whole.
        where = reader.where(piece.source)
        check_fit(where, piece.source, (shape, read.dtype), (shape, want.dtype))
        into.copy_(read.view(into.shape))
    want.zero_padding(value)
    return value

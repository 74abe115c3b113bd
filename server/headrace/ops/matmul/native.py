"""The matrix product by the kernel library, over weights packed in panels of 32 outputs.

One packed form serves every number of rows. Weights in float32 that came from bfloat16 are kept
as bfloat16 and widened in registers, which is exact and halves what a step reads.
"""

# T tokens · Y outputs · X inputs

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.native import Kernels, type_of

_LOW_HALF = 0xFFFF  # of a float32: what bfloat16 does not have


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in the library's memory, which is released with this object.

    Attributes:
        type: the library's number of what it is stored as.
        group: inputs that share a scale, of a coded weight; else 0.
    """

    address: int
    type: int
    outputs: int
    inputs: int
    group: int = 0


class NativeMatmul:
    """See `MatmulBackend`."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._call = kernels.matmul

    def pack(self, weight_YX: Tensor) -> PackedWeight:
        weight_YX = weight_YX.detach().contiguous()
        outputs, inputs = weight_YX.shape
        dtype = weight_YX.dtype
        if dtype == torch.float32 and _is_bf16(weight_YX):
            dtype = torch.bfloat16
        kernels, kind = self._kernels, type_of(dtype)
        address = kernels.allocate(kernels.packed_bytes(outputs, inputs, kind))
        kernels.pack(
            *(weight_YX.data_ptr(), type_of(weight_YX.dtype), inputs, None),
            *(outputs, inputs, kind, address),
        )
        packed = PackedWeight(address, kind, outputs, inputs)
        weakref.finalize(packed, kernels.release, address)
        return packed

    def apply(self, x_TX: Tensor, packed: PackedWeight, bias_Y: Tensor | None) -> Tensor:
        return product(self._call, x_TX, packed, bias_Y)


def product(
    call: Callable[..., int], x_TX: Tensor, packed: PackedWeight, bias_Y: Tensor | None
) -> Tensor:
    """Returns x_TX @ weight_YX.T + bias_Y by the library's `matmul`."""
    if x_TX.stride(1) != 1:
        x_TX = x_TX.contiguous()
    y_TY = torch.empty((x_TX.shape[0], packed.outputs), dtype=x_TX.dtype)
    call(
        *(x_TX.data_ptr(), type_of(x_TX.dtype), x_TX.stride(0), x_TX.shape[0]),
        *(packed.address, packed.type, packed.outputs, packed.inputs, packed.group),
        *(None if bias_Y is None else bias_Y.data_ptr(), y_TY.data_ptr()),
    )
    return y_TY


def _is_bf16(weight_YX: Tensor) -> bool:
    """Whether every number of a float32 weight is a bfloat16."""
    return not bool((weight_YX.view(torch.int32) & _LOW_HALF).any())

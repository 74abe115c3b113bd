"""The matrix product with a coded weight by the kernel library.

Few rows multiply codes as they are and scale the sums of each group; for more rows a strip of the
weight is widened at a time, in the cache, and multiplied as a weight of 16 or 32 bits is.
"""

# T tokens · Y outputs · I inputs

from __future__ import annotations

import weakref

from torch import Tensor

from headrace.native import CODES_4, CODES_8, Kernels, type_of
from headrace.ops.matmul.native import PackedWeight, product
from headrace.ops.quant_matmul.base import CodedWeight, Kind
from headrace.ops.rows8 import Rows8, in_model_dtype


class NativeCodedMatmul:
    """See `CodedMatmul`."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._call = kernels.matmul

    def pack(self, weight: CodedWeight) -> PackedWeight:
        kernels, codes = self._kernels, weight.codes.contiguous()
        scales_YG = weight.scales_YG.float().contiguous()
        zeros_YG = None if weight.zeros_YG is None else weight.zeros_YG.float().contiguous()
        values = None if weight.values is None else weight.values.float().contiguous()
        kind = {Kind.INT4: CODES_4, Kind.INT8: CODES_8}.get(weight.kind) or type_of(codes.dtype)
        shape = (weight.outputs, weight.columns, weight.group)
        address = kernels.allocate(kernels.coded_bytes(*shape, kind))
        kernels.pack_codes(
            *(codes.data_ptr(), scales_YG.data_ptr()),
            None if zeros_YG is None else zeros_YG.data_ptr(),
            None if values is None else values.data_ptr(),
            *(*shape, kind, address),
        )
        packed = PackedWeight(address, kind, *shape)
        weakref.finalize(packed, kernels.release, address)
        return packed

    def takes_rows8(self, packed: PackedWeight) -> bool:
        del packed
        return False

    def apply(self, x_TI: Tensor | Rows8, packed: PackedWeight, bias_Y: Tensor | None) -> Tensor:
        return product(self._call, in_model_dtype(x_TI), packed, bias_Y)

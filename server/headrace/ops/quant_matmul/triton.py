"""The matrix product with a coded weight on CUDA.

Up to `ROWS_MAX` rows the kernel multiplies codes; for more a weight of the activations' dtype is
made, which lives for one product, and the library multiplies that.
"""

# T tokens · Y outputs · I inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from headrace.ops.matmul.skinny import Scratch
from headrace.ops.quant_matmul import channels, groups, kernels
from headrace.ops.quant_matmul.base import CodedWeight, Kind
from headrace.ops.quant_matmul.channels import Channels
from headrace.ops.quant_matmul.groups import Groups
from headrace.ops.rows8 import Rows8, in_model_dtype
from headrace.ops.rows8.triton import TritonQuantizeRows
from headrace.ops.triton import FP8_CAPABILITY, Gpu

ROWS_MAX = 64
# Rows of a tile; what the tensor cores multiply at least, and what fits.
_ROWS = (16, 32, 64)
_BLOCK_N = 64
_BLOCK_K = 64  # a whole group, where that has fewer
_WIDEN = (32, 128)


@dataclass(frozen=True, eq=False)
class PackedCodes:
    """A weight as `kernels` read it."""

    kind: int
    codes: Tensor
    scales_YG: Tensor
    zeros_YG: Tensor | None
    values: Tensor | None
    group: int
    block_k: int
    inputs: int


class TritonCodedMatmul:
    """See `CodedMatmul`."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype = torch.float32) -> None:
        """
        Args:
            dtype: of the model: what is packed for 16 bits does not multiply others.
        """
        self._gpu = gpu
        self._dtype = dtype
        self._quantize = TritonQuantizeRows(gpu)
        self._scratch: Scratch | None = None

    def pack(self, weight: CodedWeight) -> Channels | Groups | PackedCodes:
        if self._scratch is None:
            self._scratch = Scratch(weight.codes.device)
        if self.takes_rows8_of(weight):
            return channels.pack(weight, self._dtype, self._scratch)
        if groups.refusal(weight, self._dtype) is None:
            return groups.pack(weight, self._dtype, self._scratch)
        return self.pack_codes(weight)

    def takes_rows8_of(self, weight: CodedWeight) -> bool:
        """Whether a weight, once packed, takes rows of eight bits."""
        newer = self._gpu.capability >= FP8_CAPABILITY
        return newer and channels.refusal(weight, self._dtype) is None

    def takes_rows8(self, packed: Channels | Groups | PackedCodes) -> bool:
        return isinstance(packed, Channels)

    def apply(
        self, x_TI: Tensor | Rows8, packed: Channels | Groups | PackedCodes, bias_Y: Tensor | None
    ) -> Tensor:
        assert self._scratch is not None, "a weight is packed before it is applied"
        if isinstance(packed, Channels):
            rows8 = x_TI if isinstance(x_TI, Rows8) else self._quantize(x_TI)
            return channels.multiply(rows8, packed, bias_Y, self._scratch, self._gpu)
        x_TI = in_model_dtype(x_TI)
        if isinstance(packed, Groups):
            return groups.multiply(x_TI, packed, bias_Y, self._scratch, self._gpu)
        return self._apply_codes(x_TI, packed, bias_Y)

    def pack_codes(self, weight: CodedWeight) -> PackedCodes:
        """Packs a weight of any kind, for activations of any dtype."""
        kinds = {Kind.INT4: kernels.NUMBERS4, Kind.INT8: kernels.NUMBERS8, Kind.FP8: kernels.FLOATS}
        kind = kernels.VALUES4 if weight.values is not None else kinds[weight.kind]
        zeros_YG = weight.zeros_YG
        return PackedCodes(
            kind=kind.value,
            codes=weight.codes.contiguous(),
            scales_YG=weight.scales_YG.float().contiguous(),
            zeros_YG=None if zeros_YG is None else zeros_YG.float().contiguous(),
            values=weight.values,
            group=weight.group,
            block_k=_block_k(weight.group, weight.scales_YG.shape[1]),
            inputs=weight.columns,
        )

    def _apply_codes(self, x_TI: Tensor, packed: PackedCodes, bias_Y: Tensor | None) -> Tensor:
        rows = x_TI.shape[0]
        if rows > ROWS_MAX or packed.block_k == 0:
            return F.linear(x_TI, self.widen(packed, x_TI.dtype), bias_Y)
        if x_TI.stride(1) != 1:
            x_TI = x_TI.contiguous()
        outputs = packed.codes.shape[0]
        y_TY = torch.empty((rows, outputs), dtype=x_TI.dtype, device=x_TI.device)
        self._gpu.run(
            kernels.coded_tiles_kernel,
            (triton.cdiv(outputs, _BLOCK_N),),
            *(x_TI, *_operands(packed), bias_Y, y_TY),
            *(rows, outputs, packed.inputs, packed.scales_YG.shape[1], packed.group),
            x_TI.stride(0),
            KIND=packed.kind,
            ZEROS=packed.zeros_YG is not None,
            MB=next(size for size in _ROWS if rows <= size),
            BN=_BLOCK_N,
            BK=packed.block_k,
            STAGES=3,
            warps=4,
        )
        return y_TY

    def widen(self, packed: PackedCodes, dtype: torch.dtype) -> Tensor:
        """Returns weight_YI, new."""
        outputs, block_n, block_k = packed.codes.shape[0], *_WIDEN
        weight_YI = torch.empty((outputs, packed.inputs), dtype=dtype, device=packed.codes.device)
        self._gpu.run(
            kernels.widen_kernel,
            (triton.cdiv(outputs, block_n), triton.cdiv(packed.inputs, block_k)),
            *(*_operands(packed), weight_YI),
            *(outputs, packed.inputs, packed.scales_YG.shape[1], packed.group),
            KIND=packed.kind,
            ZEROS=packed.zeros_YG is not None,
            BN=block_n,
            BK=block_k,
            warps=4,
        )
        return weight_YI


def _operands(packed: PackedCodes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # What there is not is not read: any address will do.
    scales_YG = packed.scales_YG
    zeros_YG = scales_YG if packed.zeros_YG is None else packed.zeros_YG
    values = scales_YG if packed.values is None else packed.values
    return packed.codes, scales_YG, zeros_YG, values


def _block_k(group: int, groups: int) -> int:
    """Returns the inputs a step of the loop, all of one group; 0 where no number of them will do.

    With 32 of them a product of the even columns has 16 terms, which is the least.
    """
    if groups == 1 or group % _BLOCK_K == 0:
        return _BLOCK_K
    return 32 if group % 32 == 0 else 0

"""The matrix product of a linear layer whose weight is stored as codes of four or eight bits.

Formats of checkpoints are many, what a kernel multiplies is one value: codes, and the scales that
groups of inputs share. `quant` makes it of what a checkpoint holds.
"""

# T tokens · Y outputs · X inputs · I inputs as the codes have them · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.ops.rows8 import Rows8


class Kind(Enum):
    """What a code is; the operation that multiplies it is named after it."""

    INT4 = "int4_matmul"  # 0 to 15: an integer, or an index into 16 values
    INT8 = "int8_matmul"  # 0 to 255
    FP8 = "fp8_matmul"  # e4m3 or e5m2


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """weight_YX[y, order[i]] = (value of code[y, i] - zeros[y, g]) * scales[y, g], g = i // group.

    Attributes:
        codes: of `INT4` uint8 [Y, I / 2], input 2 j in the lower half of byte j; of `INT8` uint8
            [Y, I]; of `FP8` float8 [Y, I].
        scales_YG: float32.
        group: inputs that share a scale; the last group may have fewer.
        inputs: X.
        zeros_YG: float32; None where nothing is subtracted.
        order_I: int64, the input that each column of codes is multiplied with; None: the same.
            An input may come twice, if all but one of its weights are zero.
        values: float32 [16]: of `INT4`, what a code stands for; None: its number.
    """

    kind: Kind
    codes: Tensor
    scales_YG: Tensor
    group: int
    inputs: int
    zeros_YG: Tensor | None = None
    order_I: Tensor | None = None
    values: Tensor | None = None

    @property
    def outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def columns(self) -> int:
        """I."""
        return self.codes.shape[1] * (2 if self.kind == Kind.INT4 else 1)

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scales_YG, self.zeros_YG, self.order_I)
        return sum(part.nbytes for part in parts if part is not None)

    def columns_YI(self) -> Tensor:
        """Returns the weight in float32, its columns as the codes have them."""
        if self.kind == Kind.INT4:
            codes_YI = halves(self.codes)
            values = self.values
            weight_YI = codes_YI.float() if values is None else values[codes_YI.long()]
        else:
            weight_YI = self.codes.float()
        if self.zeros_YG is not None:
            weight_YI -= self._spread(self.zeros_YG)
        return weight_YI.mul_(self._spread(self.scales_YG))

    def dequantize(self) -> Tensor:
        """Returns weight_YX in float32."""
        weight_YI = self.columns_YI()
        if self.order_I is None:
            return weight_YI
        weight_YX = weight_YI.new_zeros(self.outputs, self.inputs)
        return weight_YX.index_add_(1, self.order_I, weight_YI)

    def _spread(self, of_YG: Tensor) -> Tensor:
        if of_YG.shape[1] == 1:
            return of_YG
        return of_YG.repeat_interleave(self.group, dim=1)[:, : self.columns]


class CodedMatmul(Protocol):
    """How coded weights are kept and multiplied."""

    def pack(self, weight: CodedWeight) -> Any:
        """Rearranges a weight for `apply`, once, at load; the result may share its storage."""
        ...

    def takes_rows8(self, packed: Any) -> bool:
        """Whether `apply` is faster with rows of eight bits, and takes those."""
        ...

    def apply(self, x_TI: Tensor | Rows8, packed: Any, bias_Y: Tensor | None) -> Tensor:
        """Returns x_TI @ weight_YI.T + bias_Y, new, in the dtype of `x_TI` (of rows of
        eight bits: the model's), whose columns are in the order of the codes."""
        ...


def halves(codes: Tensor) -> Tensor:
    """Returns the codes of four bits, uint8 [..., 2 N], that are stored two a byte, [..., N]."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def pack_halves(codes: Tensor) -> Tensor:
    """Returns codes of four bits, uint8 [..., 2 N], two a byte, the first in the lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4

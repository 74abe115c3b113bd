"""Linear layers whose weight is codes: what all formats with codes share."""

# T tokens · Y outputs · X inputs · I inputs as the codes have them · G groups of inputs

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.ops.quant_matmul.base import CodedWeight, Kind, halves, pack_halves
from headrace.ops.rows8 import Rows8, in_model_dtype
from headrace.quant.base import LinearShape
from headrace.quant.parameter import Declares, Split

if TYPE_CHECKING:
    from headrace.ops import OpTable
    from headrace.ops.quant_matmul import CodedMatmul

# Columns that a group is filled up to, of which a rank has a part: what every kernel can multiply.
FILLED_TO = 32


class CodedMethod:
    """A packed weight and its bias."""

    def __init__(self, weight: CodedWeight, bias_Y: Tensor | None, matmul: CodedMatmul) -> None:
        self.nbytes = weight.nbytes
        self.order_I = weight.order_I
        self._inputs = weight.inputs
        self._device = weight.codes.device
        self.packed: Any = matmul.pack(weight)
        # Rows are put in order before they are rounded.
        self.takes_rows8 = weight.order_I is None and matmul.takes_rows8(self.packed)
        self.bias_Y = bias_Y
        self._apply = matmul.apply

    def apply(self, x_TX: Tensor | Rows8) -> Tensor:
        return self._product(x_TX, self.bias_Y)

    def apply_gated(self, x_TX: Tensor | Rows8) -> Tensor | None:
        del x_TX
        return None

    def apply_into(self, x_TX: Tensor | Rows8, out_TY: Tensor) -> bool:
        del x_TX, out_TY
        return False

    def dequantize(self) -> Tensor:
        # The packed layout is the backend's secret: the unit matrix brings the weight back.
        return self._product(torch.eye(self._inputs, device=self._device), None).T

    def _product(self, x_TX: Tensor | Rows8, bias_Y: Tensor | None) -> Tensor:
        if self.order_I is not None:
            x_TX = in_model_dtype(x_TX).index_select(1, self.order_I)
        return self._apply(x_TX, self.packed, bias_Y)


class JoinedMethod:
    """Projections that were to be fused, but take their inputs in orders of their own."""

    takes_rows8 = False

    def __init__(self, parts: list[CodedMethod]) -> None:
        self._parts = parts
        self.nbytes = sum(part.nbytes for part in parts)

    def apply(self, x_TX: Tensor | Rows8) -> Tensor:
        return torch.cat([part.apply(x_TX) for part in self._parts], dim=1)

    def apply_gated(self, x_TX: Tensor | Rows8) -> Tensor | None:
        del x_TX
        return None

    def apply_into(self, x_TX: Tensor | Rows8, out_TY: Tensor) -> bool:
        del x_TX, out_TY
        return False

    def dequantize(self) -> Tensor:
        return torch.cat([part.dequantize() for part in self._parts])


def declare_bias(module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
    """Declares the bias, if there is one."""
    if shape.bias:
        module.declare("bias", Split(0, shape.outputs), None, dtype)


def take_bias(module: Declares, shape: LinearShape) -> Tensor | None:
    """Takes the bias that this rank adds, if it adds any."""
    bias_Y = module.take("bias")
    # Where the inputs are divided, ranks' outputs are summed: the bias is the first rank's.
    if bias_Y is None or shape.inputs.start != 0:
        return None
    # Some programs that quantize write a bias of zeros for every layer.
    if not bias_Y.is_meta and not bool(bias_Y.any()):
        return None
    return bias_Y


def make_method(
    weight: CodedWeight, module: Declares, shape: LinearShape, ops: OpTable
) -> CodedMethod:
    """Packs a weight; the bias is taken off the module."""
    return CodedMethod(weight, take_bias(module, shape), ops.coded_matmul[weight.kind])


def in_order_of_groups(weight: CodedWeight, group_of_X: Tensor) -> CodedWeight:
    """Returns the weight with its columns sorted by the group that each has the scale of.

    Args:
        weight: as stored: its columns in the order of the inputs, the scales of all groups.
        group_of_X: the group of each of this rank's inputs.

    Of a group of which a rank has a part only, the rest is filled up with columns that are zero.
    """
    if group_of_X.is_meta:  # Nothing is known of it, and nothing that is launched depends on it.
        return _narrow(weight, torch.arange(-(-weight.columns // weight.group), device="meta"))
    group_of_X = group_of_X.long()
    columns = torch.arange(weight.columns, device=group_of_X.device)
    first = int(group_of_X[0])
    if torch.equal(group_of_X, first + columns // weight.group):
        return _narrow(weight, torch.arange(first, int(group_of_X[-1]) + 1, device=columns.device))
    order = group_of_X.argsort(stable=True)
    counts = group_of_X.bincount(minlength=weight.scales_YG.shape[1]).tolist()
    used = [group for group, count in enumerate(counts) if count]
    whole = all(counts[group] == weight.group for group in used)
    unit = weight.group if whole else min(FILLED_TO, weight.group)
    # -1: a column that nobody has.
    taken: list[Tensor] = []
    groups: list[int] = []
    for group, of_group in zip(used, order.split([counts[g] for g in used]), strict=True):
        units = -(-counts[group] // unit)
        groups += [group] * units
        taken.append(torch.nn.functional.pad(of_group, (0, units * unit - counts[group]), value=-1))
    columns_I = torch.cat(taken)
    weight = _narrow(weight, torch.tensor(groups, device=columns.device))
    codes_YX = halves(weight.codes) if weight.kind == Kind.INT4 else weight.codes
    codes_YI = codes_YX[:, columns_I.clamp(min=0)]
    assert weight.zeros_YG is not None, "a column is zero where its codes are the zero point"
    zeros_YI = weight.zeros_YG.to(torch.uint8).repeat_interleave(unit, dim=1)
    codes_YI = torch.where(columns_I < 0, zeros_YI, codes_YI)
    return CodedWeight(
        kind=weight.kind,
        codes=pack_halves(codes_YI) if weight.kind == Kind.INT4 else codes_YI,
        scales_YG=weight.scales_YG,
        group=unit,
        inputs=weight.inputs,
        zeros_YG=weight.zeros_YG,
        order_I=columns_I.clamp(min=0),
    )


def _narrow(weight: CodedWeight, groups: Tensor) -> CodedWeight:
    """Returns the weight with the scales of some groups, in their order."""
    zeros_YG = weight.zeros_YG
    return replace(
        weight,
        scales_YG=weight.scales_YG[:, groups],
        zeros_YG=None if zeros_YG is None else zeros_YG[:, groups],
    )

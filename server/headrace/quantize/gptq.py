"""GPTQ: columns are rounded one after the other, and what rounding one did wrong is made up for by
those that are still to come, as far as the inputs' second moments say that it can be.
"""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 4
_MOST = (1 << BITS) - 1
# Columns whose corrections are applied to all others at once; a multiple of every group.
_BLOCK = 128


@dataclass(frozen=True)
class Options:
    """How a layer is quantized.

    Attributes:
        group: inputs that share a scale; -1: all.
        act_order: whether inputs are taken in the order of their size.
        symmetric: whether zero is the middle code.
        damp: what is added to the diagonal of the second moments, as a share of its mean.
    """

    group: int
    act_order: bool
    symmetric: bool
    damp: float


@dataclass(frozen=True)
class Quantized:
    """A layer: codes uint8 [Y, X] in the inputs' order, scales and zero points [Y, G], the group of
    each input."""

    codes_YX: Tensor
    scales_YG: Tensor
    zeros_YG: Tensor
    group_of_X: Tensor

    def dequantize(self) -> Tensor:
        """Returns weight_YX in float32."""
        zeros_YX = self.zeros_YG[:, self.group_of_X]
        return (self.codes_YX.float() - zeros_YX) * self.scales_YG[:, self.group_of_X]


def quantize(weight_YX: Tensor, moments_XX: Tensor, options: Options) -> Quantized:
    """Rounds a weight.

    Args:
        weight_YX: any floating dtype.
        moments_XX: float32, the sum of x xᵀ over the inputs of the layer; overwritten.
    """
    weight_YX = weight_YX.float().clone()
    inputs = weight_YX.shape[1]
    group = inputs if options.group == -1 else options.group
    diagonal = moments_XX.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight_YX[:, dead] = 0
    order = torch.arange(inputs, device=weight_YX.device)
    if options.act_order:
        order = diagonal.argsort(descending=True, stable=True)
        weight_YX = weight_YX[:, order]
        moments_XX = moments_XX[order][:, order]
    upper_XX = _inverse_factor(moments_XX, options.damp)
    codes_YX = torch.empty_like(weight_YX)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        errors = torch.zeros_like(weight_YX[:, begin:end])
        for column in range(begin, end):
            if column % group == 0:
                # Groups do not cross blocks, or there is one: all corrections have been made.
                rest = weight_YX[:, column : column + group]
                scale, zero = scale_of(rest, options.symmetric)
                scales.append(scale)
                zeros.append(zero)
            value = weight_YX[:, column]
            codes = (value / scales[-1] + zeros[-1]).round().clamp(0, _MOST)
            codes_YX[:, column] = codes
            error = (value - (codes - zeros[-1]) * scales[-1]) / upper_XX[column, column]
            weight_YX[:, column:end] -= error[:, None] * upper_XX[column, column:end]
            errors[:, column - begin] = error
        weight_YX[:, end:] -= errors @ upper_XX[begin:end, end:]
    place = order.argsort()
    return Quantized(
        codes_YX[:, place].to(torch.uint8),
        torch.stack(scales, dim=1),
        torch.stack(zeros, dim=1),
        (torch.arange(inputs, device=order.device) // group)[place],
    )


def corrected(weight_YX: Tensor, moments_XX: Tensor, crossed_XX: Tensor, ridge: float) -> Tensor:
    """Returns the weight that makes of the inputs that it will have what `weight_YX` makes of those
    that it had: by least squares, and not far from where it was.

    Layers that are rounded before a layer change its inputs; rounding it so that it computes the
    same of changed inputs keeps that error, and this one takes some of it back (after Li et al.,
    "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025).

    Args:
        weight_YX: float32.
        moments_XX: float32, the sum of x xᵀ over the inputs x that it will have.
        crossed_XX: float32, the sum of y xᵀ, y being what it had in the place of x.
        ridge: what distance costs, as a share of the mean of the moments' diagonal; positive.
    """
    mean = moments_XX.diagonal().mean()
    if mean == 0:
        return weight_YX
    damped_XX = moments_XX.clone()
    damped_XX.diagonal().add_(ridge * mean)
    change_YX = weight_YX @ (crossed_XX - moments_XX)
    return weight_YX + torch.cholesky_solve(change_YX.T, torch.linalg.cholesky(damped_XX)).T


def scale_of(weight_Yx: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Returns the scale and the zero point of each output for a group of columns, float32.

    Scales are numbers of half precision, as the checkpoint has them. A zero point of 0 has no place
    in the format, which stores it minus one.
    """
    low = weight_Yx.amin(dim=1).clamp(max=0)
    high = weight_Yx.amax(dim=1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    flat = low == high
    low, high = low.masked_fill(flat, -1.0), high.masked_fill(flat, 1.0)
    tiny = torch.finfo(torch.float16).tiny
    scale_Y = ((high - low) / _MOST).clamp(min=tiny).half().float()
    if symmetric:
        return scale_Y, torch.full_like(scale_Y, (_MOST + 1) // 2)
    return scale_Y, (-low / scale_Y).round().clamp(1, _MOST)


def _inverse_factor(moments_XX: Tensor, damp: float) -> Tensor:
    """Returns the upper triangle U with UᵀU the inverse of the damped second moments."""
    diagonal = moments_XX.diagonal()
    mean = diagonal.mean()
    for _ in range(6):
        diagonal += damp * mean
        lower_XX, failed = torch.linalg.cholesky_ex(moments_XX)
        if int(failed) == 0:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower_XX), upper=True)
        damp = max(2 * damp, 1e-4)
    raise ValueError("the inputs' second moments are singular: more text, or a larger --percdamp")

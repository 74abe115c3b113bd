"""The plain way: the group sums, and `ops.rms_norm` adds and normalises."""

# T tokens · D width

from __future__ import annotations

from torch import Tensor

from headrace.device.peers import Share
from headrace.ops.reduce_norm.base import ReduceNorm
from headrace.ops.rms_norm.reference import add_rms_norm, rms_norm


def apart(share: Share, ranks: int, width: int) -> ReduceNorm | None:
    """See `MakeReduceNorm`: layers call the two operations one after the other."""
    del share, ranks, width


def reduce_norm(
    partial_RTD: list[Tensor], residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What every rank computes, given what all of them add: in rank order, rounded, then added."""
    summed_TD = sum(x_TD.float() for x_TD in partial_RTD)
    assert isinstance(summed_TD, Tensor), "a group has ranks"
    x_TD = summed_TD.to(weight_D.dtype)
    if residual_TD is None:
        return rms_norm(x_TD, weight_D, eps), x_TD
    return add_rms_norm(x_TD, residual_TD, weight_D, eps)

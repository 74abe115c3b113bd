"""The gated activation by the kernel library."""

# T tokens · F mlp width

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from headrace.native import Kernels, type_of


def native_silu_mul(kernels: Kernels) -> Callable[[Tensor], Tensor]:
    """Returns what `reference.silu_mul` is."""
    call = kernels.silu_mul

    def silu_mul(gate_up_T2F: Tensor) -> Tensor:
        gate_up_T2F = gate_up_T2F.contiguous()
        tokens, columns = gate_up_T2F.shape
        act_TF = torch.empty((tokens, columns // 2), dtype=gate_up_T2F.dtype)
        kind = type_of(gate_up_T2F.dtype)
        call(gate_up_T2F.data_ptr(), kind, tokens, columns // 2, act_TF.data_ptr())
        return act_TF

    return silu_mul

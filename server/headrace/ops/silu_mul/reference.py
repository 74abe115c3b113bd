"""The gated activation in plain PyTorch."""

# T tokens · F mlp width

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """silu(gate) · up, where a row of `gate_up_T2F` is gate and up, one after the other.

    Returns: act_TF, new.
    """
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF

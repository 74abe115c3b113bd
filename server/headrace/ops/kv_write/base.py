"""What the numbers of a paged cache mean, where they are codes of eight bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What a cache may be kept in besides the model's dtype.
CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class KvScales:
    """What the numbers of a layer's caches are multiplied by; 1 where they are no codes."""

    k: float = 1.0
    v: float = 1.0


UNIT = KvScales()


def code_max(dtype: torch.dtype) -> float:
    """The largest number that a code stands for; 0.0 of a dtype that has no codes."""
    return torch.finfo(dtype).max if dtype in CODES else 0.0


def encode(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """What a cache of this dtype keeps of `x`: itself, or the codes of x / scale.

    What is beyond the largest code becomes that; NaN stays NaN.
    """
    most = code_max(dtype)
    if most == 0.0:
        return x
    return (x.float() * (1.0 / scale)).clamp(-most, most).to(dtype)


def plain(cells: Tensor) -> Tensor:
    """The same memory, in a dtype that can be indexed: few of PyTorch's kernels know codes."""
    return cells.view(torch.uint8) if cells.dtype in CODES else cells

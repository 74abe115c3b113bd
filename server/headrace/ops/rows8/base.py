"""Rows of activations in eight bits, as products with eight-bit floats take them."""

# T tokens · X columns

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
# The largest number of the dtype.
MOST = 448.0
# What a row of zeros is scaled by: no division by zero, and zeros stay zeros.
SCALE_MIN = 1e-12


class Rows8(NamedTuple):
    """row[t] = codes[t] * scale[t].

    Attributes:
        codes_TX: float8_e4m3fn, contiguous.
        scale_T: float32; the largest absolute value of the row over 448.
    """

    codes_TX: Tensor
    scale_T: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes_TX.shape

    def widened(self) -> Tensor:
        """Returns the rows in float32."""
        return self.codes_TX.float() * self.scale_T[:, None]


def in_model_dtype(x_TX: Tensor | Rows8) -> Tensor:
    """Returns rows that no layer before has rounded to eight bits."""
    assert not isinstance(x_TX, Rows8), "rows of eight bits come only where they are taken"
    return x_TX


class Rows8Ops(NamedTuple):
    """What an implementation builds. Signatures and meaning: `reference.py`."""

    quantize: Callable[[Tensor], Rows8]
    rms_norm: Callable[[Tensor, Tensor, float], Rows8]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Rows8, Tensor]]
    silu_mul: Callable[[Tensor], Rows8]

"""The angles of rotary position embedding, with the scalings that stretch a context."""

# T tokens · E head dim · P positions

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Llama3Scaling:
    """Long waves are slowed by `factor`, short ones kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_tokens: int

    def apply(self, inv_freq: Tensor, spec: RopeSpec) -> tuple[Tensor, float]:
        wave = 2 * math.pi / inv_freq
        longest = self.original_tokens / self.low_freq_factor
        shortest = self.original_tokens / self.high_freq_factor
        span = self.high_freq_factor - self.low_freq_factor
        kept = (self.original_tokens / wave - self.low_freq_factor) / span
        blended = (1 - kept) * inv_freq / self.factor + kept * inv_freq
        scaled = torch.where(wave > longest, inv_freq / self.factor, blended)
        return torch.where(wave < shortest, inv_freq, scaled), 1.0


@dataclass(frozen=True)
class LinearScaling:
    """All waves are slowed by `factor`."""

    factor: float

    def apply(self, inv_freq: Tensor, spec: RopeSpec) -> tuple[Tensor, float]:
        return inv_freq / self.factor, 1.0


@dataclass(frozen=True)
class YarnScaling:
    """Dimensions that turn seldom are slowed by `factor`, the others less; scores are sharpened."""

    factor: float
    original_tokens: int
    beta_fast: float
    beta_slow: float
    attention_factor: float  # multiplies queries and keys
    truncate: bool

    def apply(self, inv_freq: Tensor, spec: RopeSpec) -> tuple[Tensor, float]:
        low, high = self._dim_at(self.beta_fast, spec), self._dim_at(self.beta_slow, spec)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, spec.head_dim - 1)
        high = high + 0.001 if low == high else high
        dims = torch.arange(spec.head_dim // 2, dtype=torch.float32)
        slowed = ((dims - low) / (high - low)).clamp(0, 1)
        return inv_freq / self.factor * slowed + inv_freq * (1 - slowed), self.attention_factor

    def _dim_at(self, turns: float, spec: RopeSpec) -> float:
        """Returns the dimension that turns so often within the original context."""
        wave = self.original_tokens / (turns * 2 * math.pi)
        return spec.head_dim * math.log(wave) / (2 * math.log(spec.theta))


@dataclass(frozen=True)
class RopeSpec:
    """The facts by which a model rotates queries and keys."""

    head_dim: int  # E
    theta: float
    scaling: Llama3Scaling | LinearScaling | YarnScaling | None = None


class Rotary(nn.Module):
    """Cosines and sines of a step's positions, which all layers share."""

    inv_freq: Tensor

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
        inv_freq, self._scale = 1.0 / (spec.theta**exponent), 1.0
        if spec.scaling is not None:
            inv_freq, self._scale = spec.scaling.apply(inv_freq, spec)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self._table_PE: Tensor | None = None

    def tabulate(self, positions: int) -> Tensor:
        """Computes the angles of so many positions once and for all; returns them, [P, E]."""
        where = self.inv_freq.device
        self._table_PE = self._compute(torch.arange(positions, device=where))
        return self._table_PE

    def forward(self, positions_T: Tensor) -> Tensor:
        """Returns cos_sin_TE, float32: a row is the E/2 cosines, then the E/2 sines."""
        if self._table_PE is not None:
            return self._table_PE.index_select(0, positions_T)
        return self._compute(positions_T)

    def _compute(self, positions_T: Tensor) -> Tensor:
        angles_TE = positions_T.unsqueeze(1) * self.inv_freq
        cos_sin_TE = torch.cat((angles_TE.cos(), angles_TE.sin()), dim=1)
        return cos_sin_TE if self._scale == 1.0 else cos_sin_TE * self._scale

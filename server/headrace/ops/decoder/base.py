"""What the fused decoder is built from: parameters that the composed one has already packed."""

# D width · E head dim · V vocabulary · C = (H + 2K)·E

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.matmul.native import PackedWeight


@dataclass(frozen=True)
class LinearWeights:
    """A packed weight and perhaps a bias."""

    weight: PackedWeight
    bias: Tensor | None


@dataclass(frozen=True)
class LayerWeights:
    """A block's parameters. Norms are vectors."""

    attention_norm: Tensor
    qkv: LinearWeights
    q_norm: Tensor | None  # with k_norm: queries and keys are normalised before they are rotated
    k_norm: Tensor | None
    out: LinearWeights
    mlp_norm: Tensor
    gate_up: LinearWeights
    down: LinearWeights
    window: int  # positions a token sees, its own included; 0: all


@dataclass(frozen=True)
class DecoderWeights:
    """All parameters of a decoder of Llama's family, and what they do not tell."""

    embedding: Tensor  # [V][D]
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: LinearWeights
    dtype: torch.dtype  # of activations, norms and caches
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float

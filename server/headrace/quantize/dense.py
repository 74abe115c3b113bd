"""One block of a dense decoder over whole sequences, with what its linear layers are given."""

# T tokens · D width · F mlp width · H query heads · K kv heads · E head dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.layers.rotary import Rotary
from headrace.models import ModelSpec

# The layers that are quantized, in the order in which they compute; those of a group share inputs.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class DenseBlock:
    """A block's tensors, by their names in the checkpoint without the layer's prefix."""

    def __init__(self, spec: ModelSpec, layer: int, tensors: dict[str, Tensor]) -> None:
        self._spec = spec
        self._window = spec.windows[layer]
        self.tensors = tensors

    def inputs(self, stage: int, x_TD: Tensor) -> Tensor:
        """Returns what the layers of a stage are given.

        Args:
            x_TD: float32, the residual stream: before the block of the first two stages, after its
                attention of the others.
        """
        if stage == 0:
            return self._norm(x_TD, "input_layernorm")
        if stage == 1:
            return self._attended(self._norm(x_TD, "input_layernorm"))
        normed_TD = self._norm(x_TD, "post_attention_layernorm")
        if stage == 2:
            return normed_TD
        gate_TF = F.silu(self.linear(normed_TD, "mlp.gate_proj"))
        return gate_TF * self.linear(normed_TD, "mlp.up_proj")

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Returns a layer's outputs."""
        bias = self.tensors.get(f"{name}.bias")
        return F.linear(x, self.tensors[f"{name}.weight"], bias)

    def _attended(self, x_TD: Tensor) -> Tensor:
        spec = self._spec
        tokens, dim = x_TD.shape[0], spec.head_dim
        q_THE = self.linear(x_TD, "self_attn.q_proj").view(tokens, spec.heads, dim)
        k_TKE = self.linear(x_TD, "self_attn.k_proj").view(tokens, spec.kv_heads, dim)
        v_TKE = self.linear(x_TD, "self_attn.v_proj").view(tokens, spec.kv_heads, dim)
        if spec.qk_norm:
            q_THE = self._norm(q_THE, "self_attn.q_norm")
            k_TKE = self._norm(k_TKE, "self_attn.k_norm")
        positions_T = torch.arange(tokens, device=x_TD.device)
        cos_sin_TE = Rotary(spec.rope).to(x_TD.device)(positions_T)
        q_HTE = _rotated(q_THE, cos_sin_TE).transpose(0, 1)
        k_KTE = _rotated(k_TKE, cos_sin_TE).transpose(0, 1)
        ago_TT = positions_T[:, None] - positions_T[None, :]
        seen_TT = ago_TT >= 0
        if self._window > 0:
            seen_TT &= ago_TT < self._window
        group = spec.heads // spec.kv_heads
        o_HTE = F.scaled_dot_product_attention(
            q_HTE,
            k_KTE.repeat_interleave(group, dim=0),
            v_TKE.transpose(0, 1).repeat_interleave(group, dim=0),
            attn_mask=seen_TT,
        )
        return o_HTE.transpose(0, 1).flatten(1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        factor = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._spec.norm_eps)
        return x * factor * self.tensors[f"{name}.weight"]


def _rotated(x_THE: Tensor, cos_sin_TE: Tensor) -> Tensor:
    cos, sin = cos_sin_TE.unsqueeze(1).chunk(2, dim=-1)
    low, high = x_THE.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

"""The ground truth: a dense forward over a whole sequence, with neither cache nor fused weights."""

# T tokens · D width · H query heads · K kv heads · E head dim · V vocabulary

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from headrace.layers.rotary import Rotary
from headrace.models import read_spec


class Oracle:
    """A checkpoint, computed in the most obvious way, in float64 unless told."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        self.spec = read_spec(folder)
        self._dtype = dtype
        self._tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            tensors = load_file(file)
            self._tensors |= {name: value.to(dtype) for name, value in tensors.items()}

    def logits(self, tokens: list[int]) -> Tensor:
        """Returns logits_TV, float32: of each token, what it makes of all before it."""
        spec = self.spec
        cos_sin_TE = Rotary(spec.rope)(torch.arange(len(tokens))).to(self._dtype)
        x_TD = self._tensors["model.embed_tokens.weight"][tokens]
        for layer in range(spec.layers):
            at = f"model.layers.{layer}"
            normed_TD = self._norm(x_TD, f"{at}.input_layernorm")
            x_TD = x_TD + self._attention(normed_TD, layer, cos_sin_TE)
            normed_TD = self._norm(x_TD, f"{at}.post_attention_layernorm")
            gate_TF = F.silu(self._linear(normed_TD, f"{at}.mlp.gate_proj"))
            up_TF = self._linear(normed_TD, f"{at}.mlp.up_proj")
            x_TD = x_TD + self._linear(gate_TF * up_TF, f"{at}.mlp.down_proj")
        head = "model.embed_tokens" if spec.tied else "lm_head"
        return self._linear(self._norm(x_TD, "model.norm"), head).float()

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """Returns the next `tokens` most likely tokens."""
        sequence = list(prompt)
        for _ in range(tokens):
            sequence.append(int(self.logits(sequence)[-1].argmax()))
        return sequence[len(prompt) :]

    def _attention(self, x_TD: Tensor, layer: int, cos_sin_TE: Tensor) -> Tensor:
        spec, at = self.spec, f"model.layers.{layer}.self_attn"
        q_THE = self._linear(x_TD, f"{at}.q_proj").unflatten(1, (spec.heads, spec.head_dim))
        k_TKE = self._linear(x_TD, f"{at}.k_proj").unflatten(1, (spec.kv_heads, spec.head_dim))
        v_TKE = self._linear(x_TD, f"{at}.v_proj").unflatten(1, (spec.kv_heads, spec.head_dim))
        if spec.qk_norm:
            q_THE = self._norm(q_THE, f"{at}.q_norm")
            k_TKE = self._norm(k_TKE, f"{at}.k_norm")
        q_THE, k_TKE = _rotate(q_THE, cos_sin_TE), _rotate(k_TKE, cos_sin_TE)
        group = spec.heads // spec.kv_heads
        k_THE = k_TKE.repeat_interleave(group, dim=1)
        v_THE = v_TKE.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhe,khe->hqk", q_THE, k_THE) * spec.head_dim**-0.5
        ago = torch.arange(len(x_TD))[:, None] - torch.arange(len(x_TD))[None, :]
        hidden = ago < 0
        if spec.windows[layer] > 0:
            hidden |= ago >= spec.windows[layer]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        o_THE = torch.einsum("hqk,khe->qhe", weights, v_THE)
        return self._linear(o_THE.flatten(1), f"{at}.o_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.spec.norm_eps)
        return x * scale * self._tensors[f"{name}.weight"]


def _rotate(x_THE: Tensor, cos_sin_TE: Tensor) -> Tensor:
    cos, sin = cos_sin_TE.unsqueeze(1).chunk(2, dim=-1)
    low, high = x_THE.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

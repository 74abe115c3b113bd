"""A whole decoder step in one call of the kernel library.

The composed operations are its slow twin. Against them it saves Python's dispatch (some ten calls
a layer), and keeps the residual stream and what products return in float32 instead of rounding
both to the model's dtype.
"""

# T tokens · S sampled tokens · V vocabulary · E head dim · N blocks · P tokens per block
# K local kv heads

from __future__ import annotations

from ctypes import Array
from typing import Any

import torch
from torch import Tensor

from headrace.native import DecoderCall, Kernels, LayerCall, LinearCall, StepCall, type_of
from headrace.ops.base import No, Yes
from headrace.ops.decoder.base import DecoderWeights, LayerWeights, LinearWeights
from headrace.ops.paged_attention.native import NativePlan


def supports(weights: DecoderWeights) -> Yes | No:
    """Says whether the fused decoder computes what these weights mean."""
    if weights.dtype not in (torch.bfloat16, torch.float32):
        return No(f"has no {weights.dtype} path")
    if weights.head_dim % 2 != 0 or weights.head_dim > 256:
        return No(f"a head dim is even and at most 256, not {weights.head_dim}")
    linears = [weights.head]
    for layer in weights.layers:
        linears += [layer.qkv, layer.out, layer.gate_up, layer.down]
    if any(linear.weight.inputs % 2 != 0 for linear in linears):
        return No("a layer has an odd number of inputs")
    return Yes(f"{len(weights.layers)} layers in one call")


class NativeDecoder:
    """Computes logits. Holds all that the library's pointers point to."""

    def __init__(self, kernels: Kernels, weights: DecoderWeights) -> None:
        self._call = kernels.decoder
        self._weights = weights
        self._type = type_of(weights.dtype)
        self._layers: Array[Any] = (LayerCall * len(weights.layers))(
            *(self._layer(layer) for layer in weights.layers)
        )
        self._decoder = DecoderCall(
            layers=self._layers,
            embedding=weights.embedding.data_ptr(),
            norm=weights.norm.data_ptr(),
            head=_linear(weights.head),
            layer_count=len(weights.layers),
            type=self._type,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            head_dim=weights.head_dim,
            eps=weights.norm_eps,
        )
        self._caches: list[tuple[Tensor, Tensor]] = []

    def use_caches(self, caches: list[tuple[Tensor, Tensor]]) -> None:
        """Takes the caches (k_cache_NPKE, v_cache_NPKE) of all layers, for the steps to come."""
        self._caches = caches
        self._decoder.block_tokens = caches[0][0].shape[1]
        for layer, (k_cache_NPKE, v_cache_NPKE) in zip(self._layers, caches, strict=True):
            assert k_cache_NPKE.is_contiguous() and v_cache_NPKE.is_contiguous()
            assert k_cache_NPKE.dtype == v_cache_NPKE.dtype == self._weights.dtype
            layer.k_cache, layer.v_cache = k_cache_NPKE.data_ptr(), v_cache_NPKE.data_ptr()

    def forward(
        self,
        tokens_T: Tensor,
        cos_sin_TE: Tensor,
        cells_T: Tensor,
        sampled_S: Tensor,
        plan: NativePlan,
    ) -> Tensor:
        """Runs a step and writes its keys and values to the caches.

        Args:
            tokens_T, cells_T, sampled_S: int64, contiguous.
            cos_sin_TE: float32, contiguous; E/2 cosines, then E/2 sines.

        Returns: logits_SV, float32.
        """
        head = self._weights.head.weight
        logits_SV = torch.empty((sampled_S.shape[0], head.outputs), dtype=torch.float32)
        step = StepCall(
            ids=tokens_T.data_ptr(),
            cos_sin=cos_sin_TE.data_ptr(),
            cells=cells_T.data_ptr(),
            sampled=sampled_S.data_ptr(),
            row_start=plan.row_start_S.ctypes.data,
            row_len=plan.row_len_S.ctypes.data,
            table=plan.table_SB.data_ptr(),
            table_stride=plan.table_SB.stride(0),
            tokens=tokens_T.shape[0],
            sampled_count=sampled_S.shape[0],
            rows=len(plan.row_len_S),
            logits=logits_SV.data_ptr(),
        )
        self._call(self._decoder, step)
        return logits_SV

    def _layer(self, layer: LayerWeights) -> LayerCall:
        return LayerCall(
            qkv=_linear(layer.qkv),
            out=_linear(layer.out),
            gate_up=_linear(layer.gate_up),
            down=_linear(layer.down),
            attention_norm=layer.attention_norm.data_ptr(),
            mlp_norm=layer.mlp_norm.data_ptr(),
            q_norm=None if layer.q_norm is None else layer.q_norm.data_ptr(),
            k_norm=None if layer.k_norm is None else layer.k_norm.data_ptr(),
            window=layer.window,
        )


def _linear(linear: LinearWeights) -> LinearCall:
    packed = linear.weight
    return LinearCall(
        weight=packed.address,
        bias=None if linear.bias is None else linear.bias.data_ptr(),
        outputs=packed.outputs,
        inputs=packed.inputs,
        type=packed.type,
        group=packed.group,
    )

"""The decoder's whole step as one call, made from the composed decoder whose place it takes."""

# T tokens · S sampled tokens · V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headrace import native
from headrace.layers.linear import Linear
from headrace.layers.step import KvPool, StepContext
from headrace.models.decoder import Block, Decoder
from headrace.native import Kernels
from headrace.ops.base import No, Yes
from headrace.ops.decoder.base import DecoderWeights, LayerWeights, LinearWeights
from headrace.ops.decoder.native import NativeDecoder, supports
from headrace.ops.matmul.native import PackedWeight
from headrace.ops.paged_attention.native import NativePlan
from headrace.quant.coded import CodedMethod
from headrace.quant.none import PlainMethod


class FusedStep:
    """Computes what the composed decoder does, from the same packed weights."""

    def __init__(self, composed: Decoder, kernels: Kernels, weights: DecoderWeights) -> None:
        self._spec = composed.spec
        self._rotary = composed.rotary
        self._native = NativeDecoder(kernels, weights)
        self._kv: KvPool | None = None

    def __call__(self, tokens_T: Tensor, step: StepContext) -> Tensor:
        """See `Decoder.forward`."""
        if step.kv is not self._kv:
            self._native.use_caches([step.kv.layer(i) for i in range(self._spec.layers)])
            self._kv = step.kv
        assert isinstance(step.attention, NativePlan) and step.sampled_S is not None
        cos_sin_TE = self._rotary(step.positions_T)
        logits_SV = self._native.forward(
            *(tokens_T.contiguous(), cos_sin_TE.contiguous(), step.cells_T.contiguous()),
            *(step.sampled_S.contiguous(), step.attention),
        )
        return logits_SV[:, : self._spec.vocab_size]


def fuse(decoder: Decoder, ranks: int, kv_dtype: torch.dtype | None = None) -> Yes | No:
    """Makes the decoder's whole step one call, if it can be.

    Args:
        kv_dtype: see `OpSpec`.

    Returns: why it is, or why it stays composed of operations.
    """
    kernels = native.load()
    if isinstance(kernels, str):
        return No(kernels)
    if kv_dtype is not None:
        return No(f"keeps keys and values in the model's dtype, not {kv_dtype}")
    if ranks > 1:
        return No(f"{ranks} ranks exchange sums between the operations")
    weights = _weights(decoder)
    if isinstance(weights, No):
        return weights
    answer = supports(weights)
    if isinstance(answer, Yes):
        decoder.whole_step = FusedStep(decoder, kernels, weights)
    return answer


def _weights(composed: Decoder) -> DecoderWeights | No:
    """Collects the parameters, if the decoder is made of what the library knows."""
    spec = composed.spec
    head = _linear(composed.head)
    layers: list[LayerWeights] = []
    for block, window in zip(composed.blocks, spec.windows, strict=True):
        if type(block) is not Block:
            return No(f"does not know the data flow of {type(block).__name__}")
        attention: Any = block.attention
        qkv, out = _linear(attention.qkv), _linear(attention.out)
        gate_up, down = _linear(block.mlp.gate_up), _linear(block.mlp.down)
        if head is None or qkv is None or out is None or gate_up is None or down is None:
            return No("the weights are not packed by the kernel library")
        norms = attention.qk_norm
        layers.append(
            LayerWeights(
                attention_norm=block.attention_norm.weight,
                qkv=qkv,
                q_norm=None if norms is None else norms.q,
                k_norm=None if norms is None else norms.k,
                out=out,
                mlp_norm=block.mlp_norm.weight,
                gate_up=gate_up,
                down=down,
                window=window,
            )
        )
    if head is None or not layers:
        return No("the weights are not packed by the kernel library")
    local = spec.local(1)
    embedding: Tensor = composed.embed.weight
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layers),
        norm=composed.norm.weight,
        head=head,
        dtype=embedding.dtype,
        heads=local.heads,
        kv_heads=local.kv_heads,
        head_dim=spec.head_dim,
        norm_eps=spec.norm_eps,
    )


def _linear(layer: Linear) -> LinearWeights | None:
    """The layer's packed weight, if the library packed it."""
    method = layer.method
    if not isinstance(method, PlainMethod | CodedMethod):
        return None
    if not isinstance(method.packed, PackedWeight) or method.order_I is not None:
        return None
    return LinearWeights(method.packed, method.bias_Y)

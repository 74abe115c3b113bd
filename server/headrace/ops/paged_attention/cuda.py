"""Paged attention on CUDA devices: decode rows by the Triton kernel, rows behind them by another.

A plan holds device columns only, so that a layer's attention is its launches and nothing else.
"""

# T tokens · S rows · H local query heads · K local kv heads · E head dim
# N blocks · P tokens per block · C = (H + 2K)·E columns of the fused projection

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from headrace.ops import triton
from headrace.ops.base import No, OpSpec, Yes
from headrace.ops.kv_write.base import UNIT, KvScales
from headrace.ops.paged_attention import fa3
from headrace.ops.paged_attention.base import DecodeShape, StepShape
from headrace.ops.rope.base import QkNorm, QkvLayout

if TYPE_CHECKING:
    from headrace.device.base import Device
    from headrace.ops.paged_attention.triton_decode import DecodePlan, TritonDecode

# What the kernels' tiles are made for.
HEAD_DIM_MAX = 256
# Beyond so many rows two launches are as fast: the rotation is no longer what others wait for.
ROTATED_ROWS_MAX = 64


class Prefill(Protocol):
    """Attends to the rows of a step behind its decode rows."""

    reads_fresh: bool

    def plan(self, shape: StepShape) -> Any: ...

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        o_THE: Tensor,
        plan: Any,
        *,
        window: int = 0,
        softcap: float = 0.0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
    ) -> None:
        """Writes the prefill rows of `o_THE`."""
        ...


@dataclass(frozen=True)
class CudaPlan:
    """A step's rows, as the two kernels see them."""

    decode: DecodePlan | None
    prefill: Any  # by `Prefill.plan`; None without such rows
    captured: bool = False  # made by `plan_decode`


class CudaAttention:
    """See `AttentionBackend`."""

    graphs = True

    def __init__(self, decode: TritonDecode, prefill: Prefill) -> None:
        self._decode = decode
        self._prefill = prefill
        self.reads_fresh = prefill.reads_fresh

    def plan(self, shape: StepShape) -> CudaPlan:
        assert shape.kv_len_S is not None, "a step on this device comes with device columns"
        rows = shape.decode_rows
        decode = None
        if rows > 0:
            decode = self._decode.plan(rows, shape.kv_len_S, shape.table_SB, shape.block_tokens)
        prefill = self._prefill.plan(shape) if rows < len(shape.row_len_S) else None
        return CudaPlan(decode, prefill)

    def plan_decode(self, shape: DecodeShape) -> CudaPlan:
        decode = self._decode.plan(
            shape.rows, shape.kv_len_S, shape.table_ZW, shape.block_tokens, shape.slot_S
        )
        return CudaPlan(decode, None, captured=True)

    def replan(self, plan: CudaPlan) -> None:
        """Launches again what `plan_decode` did, as the replay of a graph does."""
        if plan.decode is not None:
            self._decode.replan(plan.decode)

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        plan: CudaPlan,
        window: int = 0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
        softcap: float = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `AttentionBackend.attend`.

        Args:
            out: o_THE, if not new.
            softcap: bounds scores to ±softcap by a hyperbolic tangent; 0: they are unbounded.
        """
        caches = k_cache_NPKE, v_cache_NPKE
        o_THE = out
        if o_THE is None:
            o_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        if plan.decode is not None:
            # It reads and writes the leading rows only.
            self._decode.attend(
                *(q_THE, *caches, o_THE, plan.decode),
                **{"window": window, "softcap": softcap, "scales": scales},
            )
        if plan.prefill is not None:
            self._prefill.attend(
                *(q_THE, *caches, o_THE, plan.prefill),
                **{"window": window, "softcap": softcap, "fresh": fresh, "scales": scales},
            )
        return o_THE

    def rotates(self, plan: CudaPlan) -> bool:
        # Other steps have rows of prompts, which may read what other rows write.
        if not plan.captured or plan.decode is None:
            return False
        return plan.decode.rows <= ROTATED_ROWS_MAX

    def rotate_and_attend(
        self,
        qkv_SC: Tensor,
        cos_sin_SE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        cells_S: Tensor,
        layout: QkvLayout,
        norm: QkNorm | None,
        plan: CudaPlan,
        window: int = 0,
        scales: KvScales = UNIT,
    ) -> Tensor:
        """See `AttentionBackend.rotate_and_attend`."""
        assert plan.decode is not None
        o_SHE = qkv_SC.new_empty((qkv_SC.shape[0], layout.heads, layout.head_dim))
        self._decode.rotate_and_attend(
            *(qkv_SC, cos_sin_SE, k_cache_NPKE, v_cache_NPKE, cells_S, o_SHE),
            *(layout, norm, plan.decode),
            window=window,
            scales=scales,
        )
        return o_SHE


class Cuda:
    """The candidate; with FlashAttention-3 for prefill rows, or with Triton for all."""

    def __init__(self, with_fa3: bool) -> None:
        self._with_fa3 = with_fa3
        self.name = "triton_fa3" if with_fa3 else "triton"

    def supports(self, spec: OpSpec, device: Device) -> Yes | No:
        needed = triton.CAPABILITY_MIN
        if spec.kv_dtype == torch.float8_e4m3fn:
            needed = triton.FP8_CAPABILITY
        refusal = triton.why_not(device, needed)
        if refusal is None and spec.dtype not in triton.DTYPES:
            refusal = f"has no {spec.dtype} path"
        if refusal is None and spec.head_dim > HEAD_DIM_MAX:
            refusal = f"a head dim is at most {HEAD_DIM_MAX}, not {spec.head_dim}"
        if refusal is None and self._with_fa3:
            refusal = fa3.why_not(spec, triton.gpu(device).capability)
        if refusal is not None:
            return No(refusal)
        prefill = "FlashAttention-3" if self._with_fa3 else "Triton"
        return Yes(f"decode rows balanced in Triton, others by {prefill}")

    def build(self, spec: OpSpec, device: Device) -> CudaAttention:
        # Imports Triton, which devices without it need not have.
        from headrace.ops.paged_attention.triton_decode import TritonDecode
        from headrace.ops.paged_attention.triton_prefill import TritonPrefill

        gpu = triton.gpu(device)
        shape = spec.heads, spec.kv_heads, spec.head_dim
        codes = spec.kv_dtype is not None
        decode = TritonDecode(*shape, spec.dtype, gpu, device.torch_device, codes=codes)
        if self._with_fa3:
            return CudaAttention(decode, fa3.Fa3Prefill(spec.head_dim))
        return CudaAttention(decode, TritonPrefill(*shape, spec.dtype, gpu))

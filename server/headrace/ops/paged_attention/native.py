"""Paged attention by the kernel library.

A decode row is one piece of work, or several where its context is longer than a fair share; a
prefill row is cut into tiles of queries. Keys and values are read once for all heads of a group.
"""

# T tokens · S rows · H local query heads · E head dim · N blocks · P tokens per block

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.native import AttentionCall, Kernels, type_of
from headrace.ops.kv_write.base import UNIT, KvScales
from headrace.ops.paged_attention.base import EagerOnly, StepShape


@dataclass(frozen=True)
class NativePlan:
    """A step's rows as the library reads them. Holds what the pointers point to."""

    row_start_S: np.ndarray
    row_len_S: np.ndarray
    table_SB: Tensor
    block_tokens: int


class NativeAttention(EagerOnly):
    """See `AttentionBackend`."""

    def __init__(self, kernels: Kernels) -> None:
        self._call = kernels.attention

    def plan(self, shape: StepShape) -> NativePlan:
        return NativePlan(
            np.ascontiguousarray(shape.row_start_S, dtype=np.int32),
            np.ascontiguousarray(shape.row_len_S, dtype=np.int32),
            shape.table_SB.to(torch.int32).contiguous(),
            shape.block_tokens,
        )

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        plan: NativePlan,
        window: int = 0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
    ) -> Tensor:
        assert scales == UNIT and k_cache_NPKE.dtype == q_THE.dtype
        tokens, heads, dim = q_THE.shape
        o_THE = torch.empty((tokens, heads, dim), dtype=q_THE.dtype)
        call = AttentionCall(
            q=q_THE.data_ptr(),
            k_cache=k_cache_NPKE.data_ptr(),
            v_cache=v_cache_NPKE.data_ptr(),
            o=o_THE.data_ptr(),
            row_start=plan.row_start_S.ctypes.data,
            row_len=plan.row_len_S.ctypes.data,
            table=plan.table_SB.data_ptr(),
            q_stride=q_THE.stride(0),
            table_stride=plan.table_SB.stride(0),
            rows=len(plan.row_len_S),
            type=type_of(q_THE.dtype),
            heads=heads,
            kv_heads=k_cache_NPKE.shape[2],
            head_dim=dim,
            block_tokens=plan.block_tokens,
            window=window,
            scale=dim**-0.5,
        )
        self._call(call)
        return o_THE

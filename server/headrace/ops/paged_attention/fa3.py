"""FlashAttention-3 for rows with any number of query tokens, on Hopper.

(Shah et al., FlashAttention-3, 2024; the package installs the module `flash_attn_interface`.) Its
operator is called directly: the package's own functions allocate an output, where decode rows
share one with these.
"""

# S rows · T tokens · H query heads · K kv heads · E head dim · N blocks · P tokens per block
# B blocks per table row

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.ops.base import OpSpec
from headrace.ops.kv_write.base import UNIT, KvScales
from headrace.ops.paged_attention.base import StepShape

CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM_MAX = 256

_MODULE = "flash_attn_interface"


def why_not(spec: OpSpec, capability: tuple[int, int]) -> str | None:
    """Why FlashAttention-3 cannot attend, or None."""
    if capability != CAPABILITY:
        return f"is made for compute capability 9.0, not {capability[0]}.{capability[1]}"
    if spec.dtype not in DTYPES:
        return f"has no {spec.dtype} path"
    if spec.kv_dtype is not None:
        return f"reads caches of {spec.dtype}, not {spec.kv_dtype}"
    if spec.head_dim % 8 != 0 or spec.head_dim > HEAD_DIM_MAX:
        return f"a head dim is a multiple of 8 and at most 256, not {spec.head_dim}"
    try:
        importlib.import_module(_MODULE)
    except (ImportError, OSError, RuntimeError) as error:
        return f"`{_MODULE}` cannot be imported: {str(error).splitlines()[0]}"
    return None


@dataclass(frozen=True)
class Fa3Plan:
    """The prefill rows of a step."""

    at: int  # the first one's first token, in T
    first_S1: Tensor  # int32, tokens between that and each row, and after the last row
    kv_len_S: Tensor  # int32
    table_SB: Tensor  # int32
    longest: int  # query tokens of the longest row
    from_zero: bool  # all rows start at position 0: what they see is fresh


class Fa3Prefill:
    """Attends to the rows of a step behind its decode rows."""

    reads_fresh = True

    def __init__(self, head_dim: int) -> None:
        importlib.import_module(_MODULE)  # Registers the operator.
        self._forward: Callable[..., Any] = torch.ops.flash_attn_3.fwd.default
        self._scale = head_dim**-0.5

    def plan(self, shape: StepShape) -> Fa3Plan:
        """Launches at most one small kernel."""
        assert shape.first_S1 is not None and shape.kv_len_S is not None
        at = shape.decode_rows
        first_S1 = shape.first_S1
        return Fa3Plan(
            at=at,
            first_S1=first_S1[at:] - at if at else first_S1,
            kv_len_S=shape.kv_len_S[at:],
            table_SB=shape.table_SB[at:],
            longest=int(shape.row_len_S[at:].max()),
            from_zero=not shape.row_start_S[at:].any(),
        )

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        o_THE: Tensor,
        plan: Fa3Plan,
        *,
        window: int = 0,
        softcap: float = 0.0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
    ) -> None:
        """Writes the prefill rows of `o_THE`."""
        assert scales == UNIT
        if q_THE.is_meta:
            return  # A rehearsal without a device: there is nothing to attend to.
        q, out = (q_THE[plan.at :], o_THE[plan.at :]) if plan.at else (q_THE, o_THE)
        first = plan.first_S1
        if fresh is not None and plan.from_zero:
            k, v = (fresh[0][plan.at :], fresh[1][plan.at :]) if plan.at else fresh
            first_k, used_k, longest_k, table = first, None, plan.longest, None
        else:
            k, v = k_cache_NPKE, v_cache_NPKE
            first_k, used_k, longest_k, table = None, plan.kv_len_S, None, plan.table_SB
        self._forward(
            q, k, v,
            None, None, None,  # new keys and values; queries that meet values
            out,
            first, first_k, None,  # cu_seqlens of queries, keys, new keys
            None, used_k,  # lengths of queries and keys
            plan.longest, longest_k,
            table,
            None, None,  # rows of the cache; padding on its left
            None, None, None,  # rotation
            None, None, None,  # what fp8 is multiplied by
            self._scale,
            True,  # causal
            window - 1 if window > 0 else -1, 0 if window > 0 else -1,
            0,  # attention_chunk
            softcap,
            True,  # rotary_interleaved
            None,  # scheduler_metadata
            1 if table is None else 0,  # splits over keys; 0: as it sees fit
            None,  # pack_gqa
            0,  # sm_margin
            None,  # sinks
        )  # fmt: skip

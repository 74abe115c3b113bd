"""Grouped-query attention over the paged cache."""

# T tokens · D width · H local query heads · K local kv heads · E head dim · C = (H + 2K)·E

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headrace.layers.build import Build, even, kv_share
from headrace.layers.linear import ColumnLinear, RowLinear
from headrace.layers.step import StepContext
from headrace.ops.kv_write import UNIT
from headrace.ops.rope import QkNorm, QkvLayout
from headrace.ops.rows8 import Rows8
from headrace.quant import Declares, Part, Split


@dataclass(frozen=True)
class AttentionSpec:
    """The facts of one layer's attention, before it is divided over ranks."""

    width: int  # D
    heads: int
    kv_heads: int
    head_dim: int  # E
    qkv_bias: bool
    out_bias: bool
    qk_norm_eps: float | None  # queries and keys are normalised before they are rotated
    window: int  # positions a token sees, its own included; 0: all


class QkNorms(Declares):
    """The RMS norms of queries and keys, which all heads of a layer share."""

    q: Tensor
    k: Tensor

    def __init__(self, build: Build, head_dim: int) -> None:
        super().__init__()
        self.declare("q", Split(0, (Part.whole(head_dim),)), None, build.dtype)
        self.declare("k", Split(0, (Part.whole(head_dim),)), None, build.dtype)


class Attention(Declares):
    """Knows nothing of batches or devices; its heads are this rank's."""

    def __init__(self, build: Build, spec: AttentionSpec, layer: int) -> None:
        super().__init__()
        heads = even(spec.heads, build.comm.size, "attention heads")
        kv_heads = kv_share(spec.kv_heads, build.comm.size)
        q = build.column(spec.heads * spec.head_dim, "columns of the attention heads")
        kv = build.kv(spec.kv_heads, spec.head_dim)
        self.qkv = ColumnLinear(build, spec.width, (q, kv, kv), spec.qkv_bias)
        self.out = RowLinear(build, q, spec.width, spec.out_bias)
        self.qk_norm = None if spec.qk_norm_eps is None else QkNorms(build, spec.head_dim)
        self._eps = spec.qk_norm_eps
        self._norm: QkNorm | None = None
        self._layer = layer
        self._window = spec.window
        self.kv_scales = UNIT  # of a cache that keeps codes; the checkpoint may know others
        self._layout = QkvLayout(heads, kv_heads, spec.head_dim)
        self._rope_and_kv_write = build.ops.rope_and_kv_write
        self._attend = build.ops.paged_attention.attend
        self._reads_fresh = build.ops.paged_attention.reads_fresh
        self._rotates = build.ops.paged_attention.rotates
        self._rotate_and_attend = build.ops.paged_attention.rotate_and_attend

    def finish(self) -> None:
        if self.qk_norm is not None and self._eps is not None:
            self._norm = QkNorm(self.qk_norm.q, self.qk_norm.k, self._eps)

    def forward(self, x_TD: Tensor | Rows8, cos_sin_TE: Tensor, step: StepContext) -> Tensor:
        """Writes the step's keys and values to the cache, then attends.

        Returns: y_TD, new, this rank's share of the sum.
        """
        k_cache_NPKE, v_cache_NPKE = step.kv.layer(self._layer)
        qkv_TC = self.qkv(x_TD)
        if step.attend is None and self._rotates(step.attention):
            # R5 holds although writes and reads are one launch: rows of a captured step write cells
            # of generated tokens, whose blocks are shared only when the step has committed.
            o_THE = self._rotate_and_attend(
                *(qkv_TC, cos_sin_TE, k_cache_NPKE, v_cache_NPKE, step.cells_T),
                *(self._layout, self._norm, step.attention, self._window, self.kv_scales),
            )
            return self.out(o_THE.flatten(1))
        # Every write of a layer comes before any read: rows of one step may share blocks (R5).
        q_THE = self._rope_and_kv_write(
            *(qkv_TC, cos_sin_TE, k_cache_NPKE, v_cache_NPKE, step.cells_T),
            *(self._layout, self._norm, self.kv_scales),
        )
        attend = step.attend or self._attend
        o_THE = attend(
            q_THE,
            k_cache_NPKE,
            v_cache_NPKE,
            step.attention,
            self._window,
            self._fresh(qkv_TC, q_THE) if self._reads_fresh else None,
            self.kv_scales,
        )
        return self.out(o_THE.flatten(1))

    def _fresh(self, qkv_TC: Tensor, q_THE: Tensor) -> tuple[Tensor, Tensor] | None:
        """The step's own keys and values, k_TKE and v_TKE, where they were rotated in place."""
        if q_THE.data_ptr() != qkv_TC.data_ptr():
            return None
        layout = self._layout
        heads = (layout.heads, layout.kv_heads, layout.kv_heads)
        _, k_TKE, v_TKE = qkv_TC.unflatten(1, (-1, layout.head_dim)).split(heads, dim=1)
        return k_TKE, v_TKE

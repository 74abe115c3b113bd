"""Paged attention on the CPU out of PyTorch's own kernels: gather a context, then attend to it.

Decode rows of similar lengths share one call, the query heads of a group folded into the query
axis: PyTorch's own grouped attention is several times slower at one query a row. Prefill rows are
attended one by one.
"""

# T tokens · S rows · H local query heads · K local kv heads · E head dim
# N blocks · P tokens per block · B blocks per table row
# R rows of a bucket · L positions gathered for each of them · Q queries of a chunk

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.base import No, OpSpec, Yes
from headrace.ops.kv_write.base import UNIT, KvScales, plain
from headrace.ops.paged_attention.base import EagerOnly, StepShape

if TYPE_CHECKING:
    from headrace.device.base import Device

# A bucket holds rows whose contexts are at most a quarter, and this many positions, longer than
# its shortest: what is gathered beyond a row's own context is work for nothing.
_SLACK_TOKENS = 32


@dataclass(frozen=True)
class _Bucket:
    """Decode rows that are attended in one call."""

    tokens_R: Tensor | None  # int64, where in T they are; None when they are all of T, in order
    cells: Tensor  # int64 [R · L]
    rows: int  # R
    mask_R11L: Tensor | None  # added to the scores; None when all contexts are equally long


@dataclass(frozen=True)
class _Chunk:
    """The queries of one prefill row."""

    at: int  # the first one's place in T
    length: int  # Q
    cells_L: Tensor  # int64
    mask_QL: Tensor | None  # added to the scores; None for plain causal from position 0


@dataclass(frozen=True)
class _Layout:
    buckets: list[_Bucket]
    chunks: list[_Chunk]


@dataclass(frozen=True)
class _Plan:
    shape: StepShape
    # By window: most models have one, and a layer with another one makes its own.
    layouts: dict[int, _Layout] = field(default_factory=dict[int, _Layout])


class TorchCpuAttention(EagerOnly):
    """The backend; `dtype` is that of the queries, which a cache's codes become when gathered."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def plan(self, shape: StepShape) -> _Plan:
        return _Plan(shape)

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        plan: _Plan,
        window: int = 0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        layout = plan.layouts.get(window)
        if layout is None:
            layout = plan.layouts[window] = _lay_out(plan.shape, window, self._dtype)
        cells = _Cells(k_cache_NPKE.flatten(0, 1), v_cache_NPKE.flatten(0, 1), scales)
        if not layout.chunks and len(layout.buckets) == 1 and layout.buckets[0].tokens_R is None:
            return _attend_bucket(q_THE, cells, layout.buckets[0])
        o_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype)
        for bucket in layout.buckets:
            q_RHE = q_THE if bucket.tokens_R is None else q_THE.index_select(0, bucket.tokens_R)
            o_RHE = _attend_bucket(q_RHE, cells, bucket)
            o_THE = (
                o_RHE if bucket.tokens_R is None else o_THE.index_copy_(0, bucket.tokens_R, o_RHE)
            )
        for chunk in layout.chunks:
            queries = slice(chunk.at, chunk.at + chunk.length)
            o_THE[queries] = _attend_chunk(q_THE[queries], cells, chunk)
        return o_THE


@dataclass(frozen=True)
class _Cells:
    """Both caches, a cell a row, and what their numbers are multiplied by."""

    k: Tensor
    v: Tensor
    scales: KvScales

    def gather(self, cells: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of some cells, as they are kept: every code is a number of any dtype."""
        return _gather(self.k, cells, dtype), _gather(self.v, cells, dtype)

    def scale(self, head_dim: int) -> float:
        """What scores are multiplied by."""
        return head_dim**-0.5 * self.scales.k

    def scaled(self, o: Tensor) -> Tensor:
        return o if self.scales.v == 1.0 else o * self.scales.v


def _gather(cache: Tensor, cells: Tensor, dtype: torch.dtype) -> Tensor:
    return plain(cache).index_select(0, cells).view(cache.dtype).to(dtype)


def _attend_bucket(q_RHE: Tensor, cells: _Cells, bucket: _Bucket) -> Tensor:
    _, heads, head_dim = q_RHE.shape
    kv_heads = cells.k.shape[1]
    k_RLKE, v_RLKE = (
        gathered.view(bucket.rows, -1, kv_heads, head_dim)
        for gathered in cells.gather(bucket.cells, q_RHE.dtype)
    )
    o_RKGE = F.scaled_dot_product_attention(
        q_RHE.view(bucket.rows, kv_heads, heads // kv_heads, head_dim),
        k_RLKE.transpose(1, 2),
        v_RLKE.transpose(1, 2),
        attn_mask=bucket.mask_R11L,
        scale=cells.scale(head_dim),
    )
    return cells.scaled(o_RKGE).reshape(bucket.rows, heads, head_dim)


def _attend_chunk(q_QHE: Tensor, cells: _Cells, chunk: _Chunk) -> Tensor:
    k_LKE, v_LKE = cells.gather(chunk.cells_L, q_QHE.dtype)
    o_1HQE = F.scaled_dot_product_attention(
        q_QHE.transpose(0, 1).unsqueeze(0),
        k_LKE.transpose(0, 1).unsqueeze(0),
        v_LKE.transpose(0, 1).unsqueeze(0),
        attn_mask=chunk.mask_QL,
        is_causal=chunk.mask_QL is None,
        scale=cells.scale(q_QHE.shape[2]),
        enable_gqa=True,
    )
    return cells.scaled(o_1HQE)[0].transpose(0, 1)


def _lay_out(shape: StepShape, window: int, dtype: torch.dtype) -> _Layout:
    start_S = shape.row_start_S.astype(np.int64)
    length_S = shape.row_len_S.astype(np.int64)
    at_S = np.cumsum(length_S) - length_S
    context_S = start_S + length_S
    # The first position that the row's first query sees.
    first_S = np.maximum(start_S + 1 - window, 0) if window > 0 else np.zeros_like(start_S)
    decode = np.flatnonzero(length_S == 1)
    alone = len(decode) == len(length_S)
    buckets = [
        _bucket(shape, rows, first_S[rows], context_S[rows], at_S[rows], alone, dtype)
        for rows in _by_length(decode, (context_S - first_S)[decode])
    ]
    chunks = [
        _chunk(
            shape, int(row), int(first_S[row]), int(context_S[row]), int(at_S[row]), window, dtype
        )
        for row in np.flatnonzero(length_S > 1)
    ]
    return _Layout(buckets, chunks)


def _by_length(rows: np.ndarray, length: np.ndarray) -> list[np.ndarray]:
    """Divides rows into buckets of similar lengths; rows of one bucket keep their order."""
    order = np.argsort(length, kind="stable")
    buckets: list[np.ndarray] = []
    begin = 0
    for end in range(1, len(order) + 1):
        limit = length[order[begin]] * 5 // 4 + _SLACK_TOKENS
        if end == len(order) or length[order[end]] > limit:
            buckets.append(np.sort(rows[order[begin:end]]))
            begin = end
    return buckets


def _cells(shape: StepShape, rows: np.ndarray, position: np.ndarray) -> Tensor:
    """Returns the cells of positions [R, L] of the rows' sequences, flat."""
    table_RB = shape.table_SB.index_select(0, torch.from_numpy(rows)).long()
    block, offset = np.divmod(position, shape.block_tokens)
    cells_RL = table_RB.gather(1, torch.from_numpy(block)) * shape.block_tokens
    return cells_RL.add_(torch.from_numpy(offset)).flatten()


def _bucket(
    shape: StepShape,
    rows: np.ndarray,
    first_R: np.ndarray,
    context_R: np.ndarray,
    at_R: np.ndarray,
    alone: bool,
    dtype: torch.dtype,
) -> _Bucket:
    seen_R = context_R - first_R
    longest = int(seen_R.max())
    step = np.arange(longest)[None, :]
    # Beyond its context a row gathers its last cell again: what was never written is never read.
    position_RL = first_R[:, None] + np.minimum(step, seen_R[:, None] - 1)
    mask = None
    if int(seen_R.min()) < longest:
        hidden_RL = torch.from_numpy(step >= seen_R[:, None])
        mask = torch.zeros(hidden_RL.shape, dtype=dtype).masked_fill_(hidden_RL, -torch.inf)
        mask = mask.view(len(rows), 1, 1, longest)
    whole = alone and len(rows) == len(shape.row_len_S)
    tokens_R = None if whole else torch.from_numpy(at_R)
    return _Bucket(tokens_R, _cells(shape, rows, position_RL), len(rows), mask)


def _chunk(
    shape: StepShape,
    row: int,
    first: int,
    context: int,
    at: int,
    window: int,
    dtype: torch.dtype,
) -> _Chunk:
    length = int(shape.row_len_S[row])
    start = context - length
    position_L = np.arange(first, context)
    cells_L = _cells(shape, np.array([row]), position_L[None, :])
    if start == 0 and (window == 0 or context <= window):
        return _Chunk(at, length, cells_L, None)
    query_Q1 = np.arange(start, context)[:, None]
    hidden_QL = position_L[None, :] > query_Q1
    if window > 0:
        hidden_QL |= position_L[None, :] <= query_Q1 - window
    mask = torch.zeros(hidden_QL.shape, dtype=dtype)
    mask.masked_fill_(torch.from_numpy(hidden_QL), -torch.inf)
    return _Chunk(at, length, cells_L, mask)


class TorchCpu:
    """The candidate."""

    name = "torch_cpu"

    def supports(self, spec: OpSpec, device: Device) -> Yes | No:
        if device.kind != "cpu":
            return No("runs on the CPU")
        if spec.dtype not in (torch.bfloat16, torch.float32):
            return No(f"has no {spec.dtype} path worth taking")
        why = "PyTorch's fused attention, rows of similar length together"
        if spec.kv_dtype is not None:
            why += f", {spec.kv_dtype} widened as it is gathered"
        return Yes(why)

    def build(self, spec: OpSpec, device: Device) -> TorchCpuAttention:
        return TorchCpuAttention(spec.dtype)

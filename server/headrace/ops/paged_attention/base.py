"""What an attention backend is: it plans once a step, and attends once a layer."""

# T tokens · S rows · M rows of a decode bucket · H local query heads · K local kv heads
# E head dim · N blocks · P tokens per block · B blocks per table row · Z slots · W table width
# C = (H + 2K)·E columns of the fused projection

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from headrace.ops.kv_write.base import UNIT, KvScales
from headrace.ops.rope.base import QkNorm, QkvLayout

# What a backend made of a step's shape. Only the backend that made it can read it.
AttentionPlan = Any


@dataclass(frozen=True)
class StepShape:
    """Which rows a step has, and where their sequences' keys and values are."""

    row_start_S: np.ndarray  # int32, host: position of the first query token of each row
    row_len_S: np.ndarray  # int32, host: query tokens of each row, which lie packed in T, in order
    table_SB: Tensor  # int32, device: block ids of each row's sequence; what is unused is any id
    block_tokens: int  # P
    # For backends whose device cannot read the host's columns; None where it can.
    kv_len_S: Tensor | None = None  # int32, device: row_start_S + row_len_S
    first_S1: Tensor | None = None  # int32, device: prefix sums of row_len_S, from 0 to T
    # So many leading rows have one query token; those after them have any number.
    decode_rows: int = 0


@dataclass(frozen=True)
class DecodeShape:
    """A decode step whose tensors are filled after it was planned, and again for every replay.

    It is what a graph of a step is captured with: rows have one query token each.
    """

    rows: int  # M
    slot_S: Tensor  # int64, device [M]: the row of `table_ZW` of each sequence
    kv_len_S: Tensor  # int32, device [M]: positions each query sees; at least 1, in padding too
    table_ZW: Tensor  # int32, device [Z + 1, W]: block ids
    block_tokens: int  # P


class AttentionBackend(Protocol):
    """Causal grouped-query attention over a paged cache.

    Query token i of row s has position row_start_S[s] + i and sees the positions 0 to its own of
    the row's sequence, all of which have been written; with `window` > 0 only the last `window` of
    them, its own included. Cells of other positions may hold anything, NaN included.

    Attributes:
        graphs: `plan_decode` exists, and `attend` may be captured in a graph.
        reads_fresh: `attend` gains from being given the step's own keys and values.
    """

    graphs: bool
    reads_fresh: bool

    def plan(self, shape: StepShape) -> AttentionPlan:
        """Prepares what all layers of a step share."""
        ...

    def plan_decode(self, shape: DecodeShape) -> AttentionPlan:
        """Plans a step that is captured: what this launches is replayed with every step."""
        ...

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        plan: AttentionPlan,
        window: int = 0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
    ) -> Tensor:
        """Scores are scaled by E^-0.5. `q_THE` has contiguous heads, its rows may be strided.

        Args:
            fresh: the step's own rotated keys and values, k_TKE and v_TKE, which the cache holds
                already: contiguous they are read faster. Rows may be strided.
            scales: what the numbers of the caches are multiplied by.

        Returns: o_THE, new and contiguous, in the dtype of `q_THE`.
        """
        ...

    def rotates(self, plan: AttentionPlan) -> bool:
        """Whether `rotate_and_attend` exists for a step of this plan."""
        ...

    def rotate_and_attend(
        self,
        qkv_SC: Tensor,
        cos_sin_SE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        cells_S: Tensor,
        layout: QkvLayout,
        norm: QkNorm | None,
        plan: AttentionPlan,
        window: int = 0,
        scales: KvScales = UNIT,
    ) -> Tensor:
        """What `RopeAndKvWrite` and then `attend` do, for rows of one token each.

        Rows write while others read: none may read the cell that another one writes.

        Returns: o_SHE, new and contiguous.
        """
        ...


class EagerOnly:
    """What backends have in common that plan every step from the host."""

    graphs = False
    reads_fresh = False

    def plan_decode(self, shape: DecodeShape) -> AttentionPlan:
        raise AssertionError("this backend has no steps to capture")

    def rotates(self, plan: AttentionPlan) -> bool:
        return False

    def rotate_and_attend(self, *_arguments: Any, **_named: Any) -> Tensor:
        raise AssertionError("this backend does not rotate")

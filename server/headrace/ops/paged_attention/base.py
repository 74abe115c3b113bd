"""What an attention backend is: it plans once a step, and attends once a layer."""

# T tokens · S rows · H local query heads · K local kv heads · E head dim
# N blocks · P tokens per block · B blocks per table row

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

# What a backend made of a step's shape. Only the backend that made it can read it.
AttentionPlan = Any


@dataclass(frozen=True)
class StepShape:
    """Which rows a step has, and where their sequences' keys and values are."""

    row_start_S: np.ndarray  # int32, host: position of the first query token of each row
    row_len_S: np.ndarray  # int32, host: query tokens of each row, which lie packed in T, in order
    table_SB: Tensor  # int32, device: block ids of each row's sequence; what is unused is any id
    block_tokens: int  # P
    kv_len_S: Tensor | None = None  # int32, device: positions each row's last token sees
    first_S1: Tensor | None = None  # int32, device: each row's first query token in T, and T
    decode_rows: int = 0  # so many leading rows have one token each


@dataclass(frozen=True)
class DecodeShape:
    """A decode step whose tensors are filled after it was planned: what graphs are recorded with.

    One query token a row. Padding rows see one position, of a table that holds scrap.
    """

    rows: int  # S
    slot_S: Tensor  # int64, device: the row of the table that each sequence has
    kv_len_S: Tensor  # int32, device: positions each row's token sees, at least 1
    table_ZW: Tensor  # int32, device: block ids of all slots
    block_tokens: int  # P


class AttentionBackend(Protocol):
    """Causal grouped-query attention over a paged cache.

    Query token i of row s has position row_start_S[s] + i and sees the positions 0 to its own of
    the row's sequence, all of which have been written; with `window` > 0 only the last `window` of
    them, its own included. Cells of other positions may hold anything, NaN included.
    """

    def plan(self, shape: StepShape) -> AttentionPlan:
        """Prepares what all layers of a step share."""
        ...

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        plan: AttentionPlan,
        window: int = 0,
    ) -> Tensor:
        """Scores are scaled by E^-0.5. `q_THE` has contiguous heads, its rows may be strided.

        Returns: o_THE, new and contiguous, in the dtype of `q_THE`.
        """
        ...

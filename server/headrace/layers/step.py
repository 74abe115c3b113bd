"""What a layer may know about the step it computes."""

# T tokens · S sampled tokens · N blocks · P tokens per block · K local kv heads · E head dim

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from headrace.ops.paged_attention import AttentionPlan


class KvPool(Protocol):
    """The paged cache, as layers see it."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns (k_cache_NPKE, v_cache_NPKE) of a layer."""
        ...


@dataclass(frozen=True)
class StepContext:
    """Made once per step, read by every layer."""

    positions_T: Tensor  # int64, position of each query token
    cells_T: Tensor  # int64, cell (block · P + offset) each token's key and value is written to
    sampled_S: Tensor | None  # int64, the tokens (of T) whose logits are wanted; None: all
    attention: AttentionPlan  # by ops.paged_attention.plan(StepShape)
    kv: KvPool
    cos_sin_TE: Tensor | None = None  # float32, as `Rotary` gives it; None: not yet computed
    # Called in the place of the backend's `attend`, with its arguments: graphs end and begin there.
    attend: Callable[..., Tensor] | None = None

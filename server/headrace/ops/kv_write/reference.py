"""Writing keys and values into the paged cache, in plain PyTorch."""

# T tokens · K local kv heads · E head dim · N blocks · P tokens per block

from __future__ import annotations

from torch import Tensor


def kv_write(
    k_TKE: Tensor, v_TKE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, cells_T: Tensor
) -> None:
    """Writes token t's key and value to cell `cells_T[t]` (block · P + offset) of both caches."""
    k_cache_NPKE.flatten(0, 1).index_copy_(0, cells_T, k_TKE)
    v_cache_NPKE.flatten(0, 1).index_copy_(0, cells_T, v_TKE)

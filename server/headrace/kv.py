"""The paged pool of keys and values: how large it may be, and its tensors.

Shapes: N blocks in the pool, P tokens per block, K local kv heads, E head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KvLayout:
    """The shape of the pool on this rank, but for the number of blocks."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    def bytes_per_token(self) -> int:
        """Keys and values of one token, all layers, on this rank."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def bytes_per_block(self) -> int:
        """Keys and values of one block, all layers, on this rank."""
        return self.block_tokens * self.bytes_per_token()


class KvPool:
    """The tensors. Zeroed when made, because 0 x NaN is NaN for whoever reads a stale cell."""

    def __init__(self, layout: KvLayout, blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.blocks = blocks
        shape = (layout.layers, 2, blocks, layout.block_tokens, layout.kv_heads, layout.head_dim)
        self._cells = torch.empty(shape, dtype=layout.dtype, device=device)
        # Few of PyTorch's kernels know numbers of eight bits; a zero is a zero byte.
        codes = layout.dtype.itemsize == 1
        self._zeroed = self._cells.view(torch.uint8) if codes else self._cells
        self._layers = [(kv[0], kv[1]) for kv in self._cells]
        self.zero_all()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer: k_cache_NPKE, v_cache_NPKE."""
        return self._layers[index]

    def zero(self, blocks: Tensor) -> None:
        """Zeroes some blocks (int64 indices) in every layer."""
        self._zeroed.index_fill_(2, blocks, 0)

    def zero_all(self) -> None:
        """Zeroes the pool; on the CPU this is also what makes the kernel hand out the pages."""
        self._zeroed.zero_()

    def bytes(self) -> int:
        """Bytes of the whole pool."""
        return self._cells.numel() * self._cells.element_size()

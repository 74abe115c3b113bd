"""What layers are built with, and how a rank's share of them is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headrace.comm.base import Comm
from headrace.device.base import Device
from headrace.errors import ConfigError
from headrace.quant import Part

if TYPE_CHECKING:
    from headrace.ops import OpTable

__all__ = ["Build", "Comm", "Device", "even", "kv_share", "vocab_share"]

# Vocabularies are padded to a multiple of this many rows on each rank.
VOCAB_MULTIPLE = 16


@dataclass(frozen=True)
class Build:
    """Passed to every layer's constructor."""

    ops: OpTable
    comm: Comm
    dtype: torch.dtype

    def column(self, size: int, what: str) -> Part:
        """Returns this rank's equal share of `size` rows or columns."""
        share = even(size, self.comm.size, what)
        return Part(size, self.comm.rank * share, (self.comm.rank + 1) * share)

    def vocab(self, size: int) -> Part:
        """Returns this rank's share of the vocabulary, padded so that all shares are equal."""
        share = vocab_share(size, self.comm.size)
        return Part(size, self.comm.rank * share, (self.comm.rank + 1) * share)

    def kv(self, kv_heads: int, head_dim: int) -> Part:
        """Returns this rank's key (or value) columns; several ranks share a head if they must."""
        share = kv_share(kv_heads, self.comm.size)
        first = self.comm.rank * kv_heads // self.comm.size
        return Part(kv_heads * head_dim, first * head_dim, (first + share) * head_dim)


def even(size: int, ranks: int, what: str) -> int:
    """Returns `size` divided over `ranks`; refuses what does not divide."""
    if size % ranks != 0:
        raise ConfigError(f"{size} {what} cannot be divided evenly over {ranks} shards")
    return size // ranks


def kv_share(kv_heads: int, ranks: int) -> int:
    """Returns the KV heads of one rank: an equal share, or one that several ranks replicate."""
    if kv_heads % ranks == 0:
        return kv_heads // ranks
    if ranks % kv_heads == 0:
        return 1
    raise ConfigError(
        f"{kv_heads} KV heads can neither be divided evenly over {ranks} shards nor replicated "
        "evenly among them"
    )


def vocab_share(size: int, ranks: int) -> int:
    """Returns the vocabulary rows of one rank, padding included."""
    multiple = VOCAB_MULTIPLE * ranks
    return -(-size // multiple) * VOCAB_MULTIPLE

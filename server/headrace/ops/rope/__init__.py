"""Rotary position embedding, alone and fused with what surrounds it in a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from headrace.ops.base import Candidate, Reference
from headrace.ops.rope import reference
from headrace.ops.rope.base import QkNorm, QkvLayout, RopeAndKvWrite

__all__ = ["CANDIDATES", "QkNorm", "QkvLayout", "RopeAndKvWrite", "RopeOps"]


class RopeOps(NamedTuple):
    """What an implementation builds. Signatures and meaning: `base.py` and `reference.py`."""

    rope: Callable[[Tensor, Tensor], Tensor]
    rope_and_kv_write: RopeAndKvWrite


CANDIDATES: list[Candidate] = [Reference(RopeOps(reference.rope, reference.rope_and_kv_write))]

"""Rotary position embedding, alone and fused with what surrounds it in a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from headrace.native import Kernels
from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.native import Native, even_heads, own_cache
from headrace.ops.rope import reference
from headrace.ops.rope.base import QkNorm, QkvLayout, RopeAndKvWrite
from headrace.ops.rope.native import native_rope_and_kv_write
from headrace.ops.triton import Gpu, Triton

__all__ = ["CANDIDATES", "QkNorm", "QkvLayout", "RopeAndKvWrite", "RopeOps"]


class RopeOps(NamedTuple):
    """What an implementation builds. Signatures and meaning: `base.py` and `reference.py`."""

    rope: Callable[[Tensor, Tensor], Tensor]
    rope_and_kv_write: RopeAndKvWrite


def _native(kernels: Kernels) -> RopeOps:
    # The rotation alone is on nobody's hot path.
    return RopeOps(reference.rope, native_rope_and_kv_write(kernels))


def _triton(spec: OpSpec, gpu: Gpu) -> RopeOps:
    from headrace.ops.rope.triton import triton_rope_and_kv_write

    return RopeOps(reference.rope, triton_rope_and_kv_write(gpu))


CANDIDATES: list[Candidate] = [
    Triton(_triton, "norm, rotation and write in one launch", even_heads),
    Native(_native, "norm, rotation and write in one pass", own_cache),
    Reference(RopeOps(reference.rope, reference.rope_and_kv_write)),
]

"""Attention over the paged cache. What a backend is: `base.py`."""

from __future__ import annotations

from headrace.ops.base import Candidate, Reference
from headrace.ops.native import Native, own_cache
from headrace.ops.paged_attention.base import (
    AttentionBackend,
    AttentionPlan,
    DecodeShape,
    StepShape,
)
from headrace.ops.paged_attention.cuda import Cuda
from headrace.ops.paged_attention.native import NativeAttention
from headrace.ops.paged_attention.reference import ReferenceAttention
from headrace.ops.paged_attention.torch_cpu import TorchCpu

__all__ = ["CANDIDATES", "AttentionBackend", "AttentionPlan", "DecodeShape", "StepShape"]

CANDIDATES: list[Candidate] = [
    Native(NativeAttention, "pages read in place, once a group", own_cache),
    TorchCpu(),
    Cuda(with_fa3=True),
    Cuda(with_fa3=False),
    Reference(ReferenceAttention()),
]

"""Sum over the ranks, addition to the residual stream, and RMS normalisation, as one launch."""

from __future__ import annotations

from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.reduce_norm.base import MakeReduceNorm, ReduceNorm
from headrace.ops.reduce_norm.reference import apart
from headrace.ops.triton import Gpu, Triton

__all__ = ["CANDIDATES", "MakeReduceNorm", "ReduceNorm"]


def _triton(spec: OpSpec, gpu: Gpu) -> MakeReduceNorm:
    from headrace.ops.reduce_norm.triton import TritonReduceNorms

    return TritonReduceNorms(gpu, spec.dtype)


CANDIDATES: list[Candidate] = [
    Triton(_triton, "one launch for few rows, where ranks share memory"),
    Reference(apart),
]

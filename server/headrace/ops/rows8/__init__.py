"""Rows of activations rounded to eight bits, alone and at the end of what makes them."""

from __future__ import annotations

from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.rows8 import reference
from headrace.ops.rows8.base import Rows8, Rows8Ops, in_model_dtype
from headrace.ops.triton import FP8_CAPABILITY, Gpu, Triton

__all__ = ["CANDIDATES", "Rows8", "Rows8Ops", "in_model_dtype"]


def _triton(spec: OpSpec, gpu: Gpu) -> Rows8Ops:
    from headrace.ops.rms_norm.triton import TritonRmsNorm
    from headrace.ops.rows8.triton import TritonQuantizeRows
    from headrace.ops.silu_mul.triton import TritonSiluMul

    norm = TritonRmsNorm(gpu)
    return Rows8Ops(
        TritonQuantizeRows(gpu), norm.rms_norm_8, norm.add_rms_norm_8, TritonSiluMul(gpu).rows8
    )


CANDIDATES: list[Candidate] = [
    Triton(_triton, "with norm and activation", capability_min=FP8_CAPABILITY),
    Reference(
        Rows8Ops(
            reference.quantize_rows,
            reference.rms_norm,
            reference.add_rms_norm,
            reference.silu_mul,
        )
    ),
]

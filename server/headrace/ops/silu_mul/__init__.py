"""The gated activation of the MLP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.native import Native
from headrace.ops.silu_mul import reference
from headrace.ops.silu_mul.native import native_silu_mul
from headrace.ops.triton import Gpu, Triton


def _triton(spec: OpSpec, gpu: Gpu) -> Callable[[Tensor], Tensor]:
    from headrace.ops.silu_mul.triton import TritonSiluMul

    return TritonSiluMul(gpu)


CANDIDATES: list[Candidate] = [
    Triton(_triton, "one pass"),
    Native(native_silu_mul, "one pass"),
    Reference(reference.silu_mul),
]

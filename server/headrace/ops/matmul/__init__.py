"""The matrix product of a linear layer."""

from __future__ import annotations

from typing import Any

from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.matmul.base import GatedMatmul, MatmulBackend
from headrace.ops.matmul.native import NativeMatmul
from headrace.ops.matmul.onednn import Onednn
from headrace.ops.matmul.reference import ReferenceMatmul
from headrace.ops.native import Native
from headrace.ops.triton import Gpu, Triton

__all__ = ["CANDIDATES", "GatedMatmul", "MatmulBackend"]


def _cuda(spec: OpSpec, gpu: Gpu) -> Any:
    from headrace.ops.matmul.cuda import CudaMatmul

    return CudaMatmul(gpu)


CANDIDATES: list[Candidate] = [
    Native(NativeMatmul, "weights packed in panels"),
    Onednn(),
    Triton(_cuda, "cuBLAS, and kernels of our own for few rows"),
    Reference(ReferenceMatmul()),
]

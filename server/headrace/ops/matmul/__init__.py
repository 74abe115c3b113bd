"""The matrix product of a linear layer."""

from __future__ import annotations

from headrace.ops.base import Candidate, Reference
from headrace.ops.matmul.base import MatmulBackend
from headrace.ops.matmul.native import NativeMatmul
from headrace.ops.matmul.onednn import Onednn
from headrace.ops.matmul.reference import ReferenceMatmul
from headrace.ops.native import Native

__all__ = ["CANDIDATES", "MatmulBackend"]

CANDIDATES: list[Candidate] = [
    Native(NativeMatmul, "weights packed in panels"),
    Onednn(),
    Reference(ReferenceMatmul()),
]

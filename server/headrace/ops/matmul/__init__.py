"""The matrix product of a linear layer."""

from __future__ import annotations

from headrace.ops.base import Candidate, Reference
from headrace.ops.matmul.base import MatmulBackend
from headrace.ops.matmul.onednn import Onednn
from headrace.ops.matmul.reference import ReferenceMatmul

__all__ = ["CANDIDATES", "MatmulBackend"]

CANDIDATES: list[Candidate] = [Onednn(), Reference(ReferenceMatmul())]

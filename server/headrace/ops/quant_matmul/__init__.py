"""The matrix product of a linear layer whose weight is stored as codes of four or eight bits."""

from __future__ import annotations

from headrace.ops.base import Candidate, Reference
from headrace.ops.quant_matmul.base import CodedMatmul, CodedWeight, Kind
from headrace.ops.quant_matmul.reference import ReferenceCodedMatmul

__all__ = ["CANDIDATES", "CodedMatmul", "CodedWeight", "Kind"]

# A list a kind: what is best for one need not have the other.
CANDIDATES: dict[Kind, list[Candidate]] = {
    kind: [
        Reference(ReferenceCodedMatmul()),
    ]
    for kind in Kind
}

"""The matrix product of a linear layer whose weight is stored as codes of four or eight bits."""

from __future__ import annotations

from typing import Any

from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.native import Native
from headrace.ops.quant_matmul.base import CodedMatmul, CodedWeight, Kind
from headrace.ops.quant_matmul.humming import Humming
from headrace.ops.quant_matmul.native import NativeCodedMatmul
from headrace.ops.quant_matmul.reference import ReferenceCodedMatmul
from headrace.ops.triton import CAPABILITY_MIN, FP8_CAPABILITY, Gpu, Triton

__all__ = ["CANDIDATES", "CodedMatmul", "CodedWeight", "Kind"]


def _triton(spec: OpSpec, gpu: Gpu) -> Any:
    from headrace.ops.quant_matmul.triton import TritonCodedMatmul

    return TritonCodedMatmul(gpu, spec.dtype)


# A list a kind: what is best for one need not have the other.
CANDIDATES: dict[Kind, list[Candidate]] = {
    kind: [
        Humming(),
        Triton(
            _triton,
            "codes multiplied in registers",
            capability_min=FP8_CAPABILITY if kind == Kind.FP8 else CAPABILITY_MIN,
        ),
        Native(NativeCodedMatmul, "codes multiplied in panels"),
        Reference(ReferenceCodedMatmul()),
    ]
    for kind in Kind
}

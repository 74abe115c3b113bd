"""The matrix product of a linear layer whose weight is stored as codes of four or eight bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.native import Native
from headrace.ops.quant_matmul.base import CodedMatmul, CodedWeight, Kind
from headrace.ops.quant_matmul.humming import Humming
from headrace.ops.quant_matmul.native import NativeCodedMatmul
from headrace.ops.quant_matmul.reference import ReferenceCodedMatmul, ReferenceRows8Matmul
from headrace.ops.triton import CAPABILITY_MIN, FP8_CAPABILITY, Gpu, Triton

if TYPE_CHECKING:
    from headrace.device.base import Device

__all__ = ["CANDIDATES", "CodedMatmul", "CodedWeight", "Kind"]


def _triton(spec: OpSpec, gpu: Gpu) -> Any:
    from headrace.ops.quant_matmul.triton import TritonCodedMatmul

    return TritonCodedMatmul(gpu, spec.dtype)


def _no_rows8(spec: OpSpec) -> str | None:
    return "activations keep 16 bits" if spec.rows8 else None


class CodedReference(Reference):
    """The candidate every list ends with."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(ReferenceCodedMatmul())
        self._kind = kind

    def build(self, spec: OpSpec, device: Device) -> Any:
        if spec.rows8 and self._kind == Kind.INT4:
            return ReferenceRows8Matmul(spec.dtype)
        return super().build(spec, device)


def _candidates(kind: Kind) -> list[Candidate]:
    # Activations have eight bits beside four only where that is asked for; beside eight-bit floats
    # they have them wherever that is faster.
    refuses = _no_rows8 if kind == Kind.INT4 else lambda spec: None
    return [
        Humming(),
        Triton(
            _triton,
            "codes multiplied in registers",
            refuses,
            capability_min=FP8_CAPABILITY if kind == Kind.FP8 else CAPABILITY_MIN,
        ),
        Native(NativeCodedMatmul, "codes multiplied in panels", refuses),
        CodedReference(kind),
    ]


# A list a kind: what is best for one need not have the other.
CANDIDATES: dict[Kind, list[Candidate]] = {kind: _candidates(kind) for kind in Kind}

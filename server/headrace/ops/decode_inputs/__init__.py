"""The inputs of a decode step, gathered on the device from slots and lengths."""

from __future__ import annotations

from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.decode_inputs import reference
from headrace.ops.decode_inputs.base import DecodeInputs, GatherDecodeInputs
from headrace.ops.triton import Gpu, Triton

__all__ = ["CANDIDATES", "DecodeInputs", "GatherDecodeInputs"]


def _triton(spec: OpSpec, gpu: Gpu) -> GatherDecodeInputs:
    from headrace.ops.decode_inputs.triton import TritonDecodeInputs

    return TritonDecodeInputs(gpu)


CANDIDATES: list[Candidate] = [
    Triton(_triton, "one launch"),
    Reference(reference.decode_inputs),
]

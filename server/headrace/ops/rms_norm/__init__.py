"""RMS normalisation, alone and fused with the residual's addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from headrace.native import Kernels
from headrace.ops.base import Candidate, OpSpec, Reference
from headrace.ops.native import Native
from headrace.ops.rms_norm import reference
from headrace.ops.rms_norm.native import NativeRmsNorm
from headrace.ops.triton import Gpu, Triton


class RmsNormOps(NamedTuple):
    """What an implementation builds. Signatures and meaning: `reference.py`."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _native(kernels: Kernels) -> RmsNormOps:
    made = NativeRmsNorm(kernels)
    return RmsNormOps(made.rms_norm, made.add_rms_norm)


def _triton(spec: OpSpec, gpu: Gpu) -> RmsNormOps:
    from headrace.ops.rms_norm.triton import TritonRmsNorm

    made = TritonRmsNorm(gpu)
    return RmsNormOps(made.rms_norm, made.add_rms_norm)


CANDIDATES: list[Candidate] = [
    Triton(_triton, "one pass, the residual in place"),
    Native(_native, "one pass"),
    Reference(RmsNormOps(reference.rms_norm, reference.add_rms_norm)),
]

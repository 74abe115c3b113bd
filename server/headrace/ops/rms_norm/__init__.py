"""RMS normalisation, alone and fused with the residual's addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from headrace.ops.base import Candidate, Reference
from headrace.ops.rms_norm import reference


class RmsNormOps(NamedTuple):
    """What an implementation builds. Signatures and meaning: `reference.py`."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


CANDIDATES: list[Candidate] = [
    Reference(RmsNormOps(reference.rms_norm, reference.add_rms_norm)),
]

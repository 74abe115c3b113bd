"""The gated activation of the MLP."""

from __future__ import annotations

from headrace.ops.base import Candidate, Reference
from headrace.ops.native import Native
from headrace.ops.silu_mul import reference
from headrace.ops.silu_mul.native import native_silu_mul

CANDIDATES: list[Candidate] = [
    Native(native_silu_mul, "one pass"),
    Reference(reference.silu_mul),
]

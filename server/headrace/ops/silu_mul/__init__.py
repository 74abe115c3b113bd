"""The gated activation of the MLP."""

from __future__ import annotations

from headrace.ops.base import Candidate, Reference
from headrace.ops.silu_mul import reference

CANDIDATES: list[Candidate] = [Reference(reference.silu_mul)]

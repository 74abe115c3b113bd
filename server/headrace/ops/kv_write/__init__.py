"""Writing keys and values into the paged cache."""

from __future__ import annotations

from headrace.ops.base import Candidate, Reference
from headrace.ops.kv_write import reference
from headrace.ops.kv_write.base import CODES, UNIT, KvScales

__all__ = ["CANDIDATES", "CODES", "UNIT", "KvScales"]

CANDIDATES: list[Candidate] = [Reference(reference.kv_write)]

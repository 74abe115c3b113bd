"""What all operations' implementations share: the facts they are chosen by, and the answer."""

# H local query heads · K local kv heads · E head dim

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from headrace.device.base import Device


@dataclass(frozen=True)
class OpSpec:
    """The facts of a model, as one rank sees them, by which implementations are chosen."""

    heads: int  # H, of this rank
    kv_heads: int  # K, of this rank
    head_dim: int  # E
    dtype: torch.dtype  # of activations and weights
    norm_eps: float
    qk_norm: bool = False  # queries and keys are normalised before they are rotated
    sliding_window: bool = False  # some layer looks back over a bounded window
    kv_dtype: torch.dtype | None = None  # of the KV cache, where that is not `dtype`
    coded: frozenset[str] = frozenset()  # operations that its coded weights need (`Kind`)
    rows8: bool = False  # integers of four bits are multiplied with activations of eight


@dataclass(frozen=True)
class Yes:
    """The implementation can run here; `why` says what makes it worth choosing."""

    why: str


@dataclass(frozen=True)
class No:
    """The implementation cannot run here."""

    why: str


class Candidate(Protocol):
    """One implementation of an operation, as its folder's `CANDIDATES` lists it."""

    name: str

    def supports(self, spec: OpSpec, device: Device) -> Yes | No: ...

    def build(self, spec: OpSpec, device: Device) -> Any: ...


@dataclass(frozen=True)
class Choice:
    """A line of the startup table."""

    op: str
    name: str
    why: str
    refused: tuple[tuple[str, str], ...] = ()  # (implementation, why not), in order of preference


def choose(
    op: str, candidates: list[Candidate], spec: OpSpec, device: Device, reference: bool
) -> tuple[Any, Choice]:
    """Builds the first candidate that supports `spec` on `device`.

    The last candidate is the reference, which supports everything.

    Returns: what the candidate builds, and the line of the startup table.
    """
    refused: list[tuple[str, str]] = []
    for candidate in candidates[-1:] if reference else candidates:
        answer = candidate.supports(spec, device)
        if isinstance(answer, Yes):
            why = "the reference was asked for" if reference else answer.why
            return candidate.build(spec, device), Choice(op, candidate.name, why, tuple(refused))
        refused.append((candidate.name, answer.why))
    raise AssertionError(f"the reference of {op} refused: {refused}")


class Reference:
    """The candidate every list ends with: plain PyTorch, runs everywhere."""

    name = "reference"

    def __init__(self, made: Any) -> None:
        self.made = made  # what `build` returns

    def supports(self, spec: OpSpec, device: Device) -> Yes | No:
        return Yes("plain PyTorch")

    def build(self, spec: OpSpec, device: Device) -> Any:
        return self.made

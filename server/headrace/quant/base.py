"""What a quantisation format is, and what it makes of a linear layer."""

# T tokens · Y outputs · X inputs

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from headrace.quant.parameter import Declares, Part

if TYPE_CHECKING:
    from headrace.ops import OpTable


@dataclass(frozen=True)
class LinearShape:
    """A linear layer's share of one rank. At most one of the two sides is divided."""

    outputs: tuple[Part, ...]  # more than one where projections are fused
    inputs: Part
    bias: bool


class LinearMethod(Protocol):
    """A linear layer with its weights in place."""

    def apply(self, x_TX: Tensor) -> Tensor:
        """Returns y_TY, new, without what other ranks would add to it."""
        ...

    def apply_gated(self, x_TX: Tensor) -> Tensor | None:
        """Returns silu(gate_TF) · up_TF, new, where apply(x_TX) is [gate_TF, up_TF] side by side;
        None where product and activation are two operations."""
        ...

    def apply_into(self, x_TX: Tensor, out_TY: Tensor) -> bool:
        """Overwrites `out_TY`, contiguous, with what `apply` returns; False: it cannot."""
        ...

    def dequantize(self) -> Tensor:
        """Returns weight_YX such that apply(x) ≈ x @ weight.T (+ bias); the oracle of tests."""
        ...


class QuantFormat(Protocol):
    """How a checkpoint stores linear layers."""

    name: str

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        """Declares on `module` the parameters that the layer is stored as, each with its split."""
        ...

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        """Takes the parameters off `module` and packs them for the op that will run them."""
        ...

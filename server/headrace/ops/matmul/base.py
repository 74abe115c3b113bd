"""The matrix product of a linear layer: weights are packed once, at load, and applied each step."""

# T tokens · Y outputs · X inputs · F mlp width

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class MatmulBackend(Protocol):
    """How unquantised weights are kept and multiplied."""

    def pack(self, weight_YX: Tensor) -> Any:
        """Rearranges a weight for `apply`, once, at load; the result may share its storage."""
        ...

    def apply(self, x_TX: Tensor, packed: Any, bias_Y: Tensor | None) -> Tensor:
        """Returns x_TX @ weight_YX.T + bias_Y, new, in the dtype of `x_TX`."""
        ...


@runtime_checkable
class GatedMatmul(Protocol):
    """A `MatmulBackend` whose product can end in the gated activation."""

    def apply_gated(self, x_TX: Tensor, packed: Any) -> Tensor | None:
        """Returns silu(gate_TF) · up_TF, new, where [gate_TF, up_TF] = x_TX @ weight_YX.T; or
        None, if product and activation one after the other are faster for so many rows."""
        ...


@runtime_checkable
class IntoMatmul(Protocol):
    """A `MatmulBackend` whose product can be written to a place given."""

    def apply_into(self, x_TX: Tensor, packed: Any, out_TY: Tensor) -> None:
        """Overwrites `out_TY`, contiguous, with x_TX @ weight_YX.T."""
        ...

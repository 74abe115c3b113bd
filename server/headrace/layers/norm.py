"""RMS normalisation, whole on every rank."""

# T tokens · D width

from __future__ import annotations

from torch import Tensor

from headrace.layers.build import Build
from headrace.quant import Declares, Part, Split


class RmsNorm(Declares):
    """The norm of a residual stream, to which the layer before it has something to add."""

    weight: Tensor

    def __init__(self, build: Build, width: int, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self._rms_norm = build.ops.rms_norm
        self._add_rms_norm = build.ops.add_rms_norm
        self.declare("weight", Split(0, (Part.whole(width),)), None, build.dtype)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the norm of the sum, and the sum; `residual_TD` may be overwritten.

        Args:
            residual_TD: None where the stream begins: the sum is `x_TD` itself.
        """
        if residual_TD is None:
            return self._rms_norm(x_TD, self.weight, self._eps), x_TD
        return self._add_rms_norm(x_TD, residual_TD, self.weight, self._eps)

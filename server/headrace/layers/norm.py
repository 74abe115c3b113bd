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
        self._add_rms_norm = build.ops.add_rms_norm
        self.declare("weight", Split(0, (Part.whole(width),)), None, build.dtype)

    def forward(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the norm of the sum, and the sum; `residual_TD` may be overwritten."""
        return self._add_rms_norm(x_TD, residual_TD, self.weight, self._eps)

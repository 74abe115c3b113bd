"""The gated MLP."""

# T tokens · D width · F local mlp width

from __future__ import annotations

from torch import Tensor, nn

from headrace.layers.build import Build
from headrace.layers.linear import ColumnLinear, RowLinear


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up as one matrix."""

    def __init__(self, build: Build, width: int, mlp_width: int, bias: bool) -> None:
        super().__init__()
        part = build.column(mlp_width, "columns of the MLP (intermediate_size)")
        self.gate_up = ColumnLinear(build, width, (part, part), bias)
        self.down = RowLinear(build, part, width, bias)
        self._silu_mul = build.ops.silu_mul

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns y_TD, new, this rank's share of the sum."""
        gated_TF = self.gate_up.gated(x_TD)
        if gated_TF is None:
            gated_TF = self._silu_mul(self.gate_up(x_TD))
        return self.down(gated_TF)

"""The gated MLP."""

# T tokens · D width · F local mlp width

from __future__ import annotations

from torch import Tensor, nn

from headrace.layers.build import Build
from headrace.layers.linear import ColumnLinear, RowLinear
from headrace.ops.rows8 import Rows8


class GatedMlp(nn.Module):
    """down(silu(gate(x)) · up(x)), gate and up as one matrix."""

    def __init__(self, build: Build, width: int, mlp_width: int, bias: bool) -> None:
        super().__init__()
        part = build.column(mlp_width, "columns of the MLP (intermediate_size)")
        self.gate_up = ColumnLinear(build, width, (part, part), bias)
        self.down = RowLinear(build, part, width, bias)
        self._silu_mul = build.ops.silu_mul
        self._silu_mul_8 = build.ops.rows8.silu_mul

    def forward(self, x_TD: Tensor | Rows8) -> Tensor:
        """Returns y_TD, new, this rank's share of the sum."""
        gated_TF = self.gate_up.gated(x_TD)
        if gated_TF is not None:
            return self.down(gated_TF)
        activate = self._silu_mul_8 if self.down.takes_rows8 else self._silu_mul
        return self.down(activate(self.gate_up(x_TD)))

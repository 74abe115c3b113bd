"""Linear layers: divided by columns, divided by rows, or whole on every rank."""

# T tokens · X inputs · Y outputs

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from headrace.layers.build import Build
from headrace.ops.rows8 import Rows8
from headrace.quant import Declares, LinearMethod, LinearShape, Part, Plain, QuantFormat


class Linear(Declares):
    """What the linear layers share: parameters by format, and the product once they are packed."""

    def __init__(self, build: Build, shape: LinearShape) -> None:
        super().__init__()
        self._build = build
        self._shape = shape
        self._format: QuantFormat = Plain()
        self.method: LinearMethod | None = None
        # By how much the packed weight is smaller than what was loaded.
        self.saved_bytes = 0
        self._format.declare(self, shape, build.dtype)

    def store_as(self, stored: QuantFormat, bias: bool) -> None:
        """Declares other parameters: those of a layer that is stored in another format.

        Args:
            bias: whether a bias is stored, although the architecture has none.
        """
        for name in list(self.splits):
            self.take(name)
        self._format = stored
        self._shape = replace(self._shape, bias=self._shape.bias or bias)
        stored.declare(self, self._shape, self._build.dtype)

    def finish(self) -> None:
        weights = [value for name, value in self.named_parameters() if name != "bias"]
        stored = sum(value.nbytes for value in weights)
        self.method = self._format.method(self, self._shape, self._build.ops)
        self.saved_bytes = stored - self.method.nbytes

    @property
    def takes_rows8(self) -> bool:
        """Whether inputs should come as rows of eight bits."""
        return self.method.takes_rows8  # pyright: ignore[reportOptionalMemberAccess]

    def forward(self, x_TX: Tensor | Rows8) -> Tensor:
        """Returns this rank's y_TY."""
        return self.method.apply(x_TX)  # pyright: ignore[reportOptionalMemberAccess]


class ColumnLinear(Linear):
    """Outputs divided over the ranks; several projections of the same input may be fused."""

    def __init__(self, build: Build, width: int, outputs: tuple[Part, ...], bias: bool) -> None:
        super().__init__(build, LinearShape(outputs, Part.whole(width), bias))

    def gated(self, x_TX: Tensor | Rows8) -> Tensor | None:
        """Returns silu of the first half of this rank's outputs, times the second half; None where
        that is not one operation."""
        return self.method.apply_gated(x_TX)  # pyright: ignore[reportOptionalMemberAccess]


class RowLinear(Linear):
    """Inputs divided over the ranks: each has a share of the sum, which the next norm takes."""

    def __init__(self, build: Build, inputs: Part, width: int, bias: bool) -> None:
        super().__init__(build, LinearShape((Part.whole(width),), inputs, bias))


class ReplicatedLinear(Linear):
    """Whole on every rank."""

    def __init__(self, build: Build, width: int, outputs: int, bias: bool) -> None:
        shape = LinearShape((Part.whole(outputs),), Part.whole(width), bias)
        super().__init__(build, shape)

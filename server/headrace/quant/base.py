"""What a quantisation format is, and what it makes of a linear layer."""

# T tokens · Y outputs · X inputs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from headrace.errors import ConfigError
from headrace.ops.quant_matmul import Kind
from headrace.ops.rows8 import Rows8
from headrace.quant.parameter import Declares, Part

if TYPE_CHECKING:
    from headrace.ops import OpTable


@dataclass(frozen=True)
class LinearShape:
    """A linear layer's share of one rank. At most one of the two sides is divided."""

    outputs: tuple[Part, ...]  # more than one where projections are fused
    inputs: Part
    bias: bool

    @property
    def by_inputs(self) -> bool:
        """Whether the inputs are divided: ranks' outputs are summed."""
        return self.inputs.size != self.inputs.full

    @property
    def rows(self) -> int:
        """Outputs of this rank."""
        return sum(part.size for part in self.outputs)


class LinearMethod(Protocol):
    """A linear layer with its weights in place.

    Attributes:
        nbytes: of the weight.
        takes_rows8: whether `apply` is faster with rows of eight bits, and takes those.
    """

    nbytes: int
    takes_rows8: bool

    def apply(self, x_TX: Tensor | Rows8) -> Tensor:
        """Returns y_TY, new, without what other ranks would add to it."""
        ...

    def apply_gated(self, x_TX: Tensor | Rows8) -> Tensor | None:
        """Returns silu(gate_TF) · up_TF, new, where apply(x_TX) is [gate_TF, up_TF] side by side;
        None where product and activation are two operations."""
        ...

    def apply_into(self, x_TX: Tensor | Rows8, out_TY: Tensor) -> bool:
        """Overwrites `out_TY`, contiguous, with what `apply` returns; False: it cannot."""
        ...

    def dequantize(self) -> Tensor:
        """Returns weight_YX such that apply(x) ≈ x @ weight.T (+ bias); the oracle of tests."""
        ...


class QuantFormat(Protocol):
    """How a checkpoint stores linear layers."""

    @property
    def name(self) -> str: ...

    def declare(self, module: Declares, shape: LinearShape, dtype: torch.dtype) -> None:
        """Declares on `module` the parameters that the layer is stored as, each with its split.

        A ConfigError says what cannot be divided so.
        """
        ...

    def method(self, module: Declares, shape: LinearShape, ops: OpTable) -> LinearMethod:
        """Takes the parameters off `module` and packs them for the op that will run them."""
        ...


@dataclass(frozen=True)
class Scheme:
    """How a whole checkpoint is quantized: which of its layers, and each in which format.

    Attributes:
        name: as configurations call it.
        of: from a module of the checkpoint, by name, to its format; None: 16 bits.
        kinds: the operations that its layers need.
        head: whether `of` is asked for the head, too, which otherwise has 16 bits.
        ignorable: patterns of tensors that nobody needs.
        on_load: whether the checkpoint has 16 bits and is quantized when it is loaded.
    """

    name: str
    of: Callable[[str], QuantFormat | None]
    kinds: frozenset[Kind]
    head: bool = False
    ignorable: tuple[str, ...] = ()
    on_load: bool = False

    def format_of(self, modules: tuple[str, ...], is_head: bool) -> QuantFormat | None:
        """Returns the format of a layer that fuses these modules of the checkpoint."""
        if is_head and not self.head:
            return None
        formats = [self.of(module) for module in modules]
        for module, found in zip(modules, formats, strict=True):
            if found != formats[0]:
                raise ConfigError(
                    f"{self.name}: {modules[0]} is stored as {_name(formats[0])} and {module} as "
                    f"{_name(found)}; layers that are computed as one must be stored alike"
                )
        return formats[0]


def _name(found: QuantFormat | None) -> str:
    return "16 bits" if found is None else str(found)


def in_units(part: Part, unit: int, what: str) -> Part:
    """Returns a range of a dimension that is stored in units of so many; refuses to cut one.

    Args:
        what: of the dimension, for the sentence: `inputs` or `outputs`.
    """
    for edge in (part.start, part.stop):
        if edge % unit != 0 and edge != part.full:
            raise ConfigError(
                f"{what} are stored in groups of {unit}, and {part.size} of {part.full} a shard "
                f"cut one at {edge}: serve with fewer shards (--num-shard), or a checkpoint "
                f"with smaller groups"
            )
    return Part(-(-part.full // unit), part.start // unit, -(-part.stop // unit))

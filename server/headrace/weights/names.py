"""Which checkpoint tensors a parameter is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Names:
    """An architecture's table from our modules to the checkpoint's."""

    # Module → the checkpoint's modules it fuses, in order; `{}` is the layer's number.
    modules: Mapping[str, tuple[str, ...]]
    # Patterns of tensors that a checkpoint may hold and nobody needs.
    ignorable: tuple[str, ...] = ()
    # Parameter → the checkpoint's spelling, where they differ.
    leaves: Mapping[str, str] = field(default_factory=dict[str, str])

    def plus(self, modules: Mapping[str, tuple[str, ...]], leaves: Mapping[str, str]) -> Names:
        """Returns the table of an architecture that has more modules."""
        return replace(self, modules={**self.modules, **modules}, leaves={**self.leaves, **leaves})

    def tie(self) -> Names:
        """Returns the table of a checkpoint whose head is its embedding."""
        head = tuple(re.escape(name) + r"\..*" for name in self.modules["head"])
        modules = {**self.modules, "head": self.modules["embed"]}
        return replace(self, modules=modules, ignorable=(*self.ignorable, *head))

    def sources(self, parameter: str) -> tuple[str, ...]:
        """Returns the checkpoint tensors of a parameter such as `blocks.3.attention.qkv.weight`."""
        module, _, leaf = parameter.rpartition(".")
        leaf = self.leaves.get(leaf, leaf)
        return tuple(f"{name}.{leaf}" for name in self.modules_of(module))

    def modules_of(self, module: str) -> tuple[str, ...]:
        """Returns the checkpoint's modules of one of ours such as `blocks.3.attention.qkv`."""
        layer = _LAYER.search(module + ".")
        number = layer.group(1) if layer else ""
        pattern = _LAYER.sub(".{}.", module + ".", count=1).rstrip(".")
        return tuple(name.format(number) for name in self.modules[pattern])

    def is_ignorable(self, tensor: str) -> bool:
        """Whether a checkpoint tensor may be left unread."""
        return any(re.fullmatch(pattern, tensor) for pattern in self.ignorable)

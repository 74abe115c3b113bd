"""What the native implementations of the operations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from headrace import native
from headrace.native import Isa, Kernels
from headrace.ops.base import No, OpSpec, Yes

if TYPE_CHECKING:
    from headrace.device.base import Device

DTYPES = (torch.bfloat16, torch.float32)


class Native:
    """The candidate of an operation that the kernel library implements."""

    name = "native"

    def __init__(
        self,
        made: Callable[[Kernels], Any],
        why: str,
        refuses: Callable[[OpSpec], str | None] = lambda spec: None,
    ) -> None:
        self._made = made  # from the library to what `build` returns
        self._why = why
        self._refuses = refuses  # what of the spec the operation cannot do

    def supports(self, spec: OpSpec, device: Device) -> Yes | No:
        if device.kind != "cpu":
            return No("runs on the CPU")
        if spec.dtype not in DTYPES:
            return No(f"has no {spec.dtype} path")
        refusal = self._refuses(spec)
        if refusal is not None:
            return No(refusal)
        kernels = native.load()
        if isinstance(kernels, str):
            return No(kernels)
        if kernels.best_isa == Isa.BASELINE:
            return No("this CPU has neither AVX2 nor AVX-512")
        return Yes(f"{self._why}, {kernels.best_isa.name.lower()}")

    def build(self, spec: OpSpec, device: Device) -> Any:
        kernels = native.load()
        assert isinstance(kernels, Kernels), kernels
        kernels.set_threads(device.threads)
        return self._made(kernels)


def own_cache(spec: OpSpec) -> str | None:
    """Refuses what `even_heads` does, and caches of another dtype than the model's."""
    if spec.kv_dtype is not None:
        return f"keeps keys and values in {spec.dtype}, not {spec.kv_dtype}"
    return even_heads(spec)


def even_heads(spec: OpSpec) -> str | None:
    """Refuses head dims that the attention and the rotation do not have."""
    if spec.head_dim % 2 != 0 or spec.head_dim > 256:
        return f"a head dim is even and at most 256, not {spec.head_dim}"
    return None

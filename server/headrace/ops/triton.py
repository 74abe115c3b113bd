"""What the Triton implementations of the operations share.

Triton itself is imported only when such an implementation is built: the modules that hold kernels
import it at their top, and are imported by nobody but a candidate's `made` and their tests.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from headrace.ops.base import No, OpSpec, Yes

if TYPE_CHECKING:
    from headrace.device.base import Device

log = logging.getLogger(__name__)

# The oldest devices the kernels are written for: the first that compute in bfloat16.
CAPABILITY_MIN = (8, 0)
# The first for whose kernels Triton converts numbers of the kind e4m3.
FP8_CAPABILITY = (8, 9)
# The first devices whose kernels can be launched before those they depend on have ended.
PDL_CAPABILITY = (9, 0)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Gpu:
    """What kernels and their launches need to know of the device."""

    capability: tuple[int, int]
    multiprocessors: int
    # Whether programmatic dependent launch exists: a kernel starts while those before it on the
    # stream still run, and waits for them itself (`gdc_wait`) before it reads what they wrote.
    pdl: bool

    @property
    def launch(self) -> dict[str, bool]:
        """What every launch of a kernel with a `PDL` flag is given."""
        return {"PDL": True, "launch_pdl": True} if self.pdl else {"PDL": False}

    def run(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, **constants: Any
    ) -> None:
        """Launches a kernel that has a `PDL` flag.

        Args:
            kernel: a `triton.jit` function; what type checkers make of one refuses its constants.
            warps: of a program.
        """
        kernel[grid](*args, **constants, num_warps=warps, **self.launch)


# Stands for the device where kernels run in Triton's interpreter.
INTERPRETED = Gpu(capability=(0, 0), multiprocessors=4, pdl=False)


def why_not(device: Device, capability_min: tuple[int, int] = CAPABILITY_MIN) -> str | None:
    """Why Triton kernels that need so new a device cannot run on this one, or None."""
    if device.kind != "cuda":
        return "runs on CUDA devices"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.capability < capability_min:
        return "compute capability {}.{} is older than {}.{}".format(
            *device.capability, *capability_min
        )
    return None


def gpu(device: Device) -> Gpu:
    """The facts of a device for which `why_not` has no reason."""
    return _gpu(device.capability, device.multiprocessors)


def gpu_at(device: torch.device) -> Gpu:
    """The facts of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return _gpu((properties.major, properties.minor), properties.multi_processor_count)


def _gpu(capability: tuple[int, int], multiprocessors: int) -> Gpu:
    return Gpu(capability, multiprocessors, pdl=capability >= PDL_CAPABILITY)


def settle_keys() -> None:
    """Has Triton hash all kernels that are imported, in one order; call it before the first launch.

    A kernel's key holds the constants of the functions that it calls only where these were hashed
    before it. Were each hashed at its first launch, keys would depend on the order of launches,
    and one process would not find what another one compiled.
    """
    if "triton" not in sys.modules:
        return
    from triton import JITFunction

    for name in sorted(name for name in sys.modules if name.startswith("headrace.ops.")):
        for value in list(vars(sys.modules[name]).values()):
            if isinstance(value, JITFunction):
                _ = value.cache_key


@contextmanager
def counting_kernels() -> Iterator[Counter[str]]:
    """Counts kernels that are launched for the first time: `found` in the cache, or `compiled`."""
    counted: Counter[str] = Counter()
    if "triton" not in sys.modules:
        yield counted
        return
    from triton import knobs

    before = knobs.compilation.listener
    chained = None if before is _warn else before

    def count(*, cache_hit: bool, **rest: Any) -> None:
        counted["found" if cache_hit else "compiled"] += 1
        if chained is not None:
            chained(cache_hit=cache_hit, **rest)

    knobs.compilation.listener = count
    try:
        yield counted
    finally:
        knobs.compilation.listener = before


def warn_of_kernels() -> None:
    """From now on warns of kernels that are launched for the first time: a step waits for each."""
    if "triton" in sys.modules:
        from triton import knobs

        knobs.compilation.listener = _warn


def _warn(*, metadata: dict[str, Any], cache_hit: bool, **rest: Any) -> None:
    del rest
    how = "loaded" if cache_hit else "compiled"
    log.warning("kernel %s was %s while a step waited for it", metadata.get("name", "?"), how)


class Triton:
    """The candidate of an operation that has Triton kernels."""

    name = "triton"

    def __init__(
        self,
        made: Callable[[OpSpec, Gpu], Any],
        why: str,
        refuses: Callable[[OpSpec], str | None] = lambda spec: None,
        capability_min: tuple[int, int] = CAPABILITY_MIN,
    ) -> None:
        self._made = made  # returns what `build` does; imports the kernels
        self._why = why
        self._refuses = refuses  # what of the spec the operation cannot do
        self._capability_min = capability_min

    def supports(self, spec: OpSpec, device: Device) -> Yes | No:
        refusal = why_not(device, self._capability_min)
        if refusal is None and spec.dtype not in DTYPES:
            refusal = f"has no {spec.dtype} path"
        if refusal is None:
            refusal = self._refuses(spec)
        return Yes(self._why) if refusal is None else No(refusal)

    def build(self, spec: OpSpec, device: Device) -> Any:
        return self._made(spec, gpu(device))

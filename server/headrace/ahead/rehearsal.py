"""Which Triton kernels a model's start will launch: found out by rehearsing it without a device.

The very code that prepares an engine runs over tensors without memory, under a driver that stands
in for CUDA's. Where a launch would compile a kernel, what decides the compilation is written down.
So there is no list of kernels to keep: what is launched is what is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from headrace import ops
from headrace.ahead.stamp import Wanted
from headrace.comm import Place
from headrace.device import Device
from headrace.device.absent import AbsentDevice
from headrace.engine import Engine, Preparation
from headrace.load import DTYPES, KV_DTYPES, engine_of
from headrace.models import HfConfig, outline_model, spec_of
from headrace.prepare import prepare_engine

WARP = 32  # threads; Triton's targets name it
# Of an H200. Launches are divided by it, but no kernel is compiled for it.
MULTIPROCESSORS = 132
# What the router asks for: the best size of blocks, so many penalty states at most, and so many
# prompt tokens of a step that are told of.
BLOCK_TOKENS = 16
STATE_SLOTS = 128
PROMPT_LOGPROB_TOKENS = 512


@dataclass(frozen=True)
class Variant:
    """A kernel and what it is to be compiled for."""

    kernel: Any  # a `triton.jit` function
    data: str  # what Triton's `preload` takes
    launcher: str  # equal where the host code that launches is the same

    @property
    def name(self) -> str:
        return self.kernel.__name__


def target_of(capability: tuple[int, int]) -> GPUTarget:
    """What Triton calls a GPU of a compute capability."""
    return GPUTarget("cuda", 10 * capability[0] + capability[1], WARP)


def variants_wanted(wanted: Wanted) -> list[Variant]:
    """Returns every kernel that a start launches."""
    rows, tokens = wanted.running_max, wanted.step_tokens_max
    slots = rows * wanted.pipeline_depth
    preparation = Preparation(
        first_step=0,
        block_tokens=wanted.block_tokens or BLOCK_TOKENS,
        slots_max=slots,
        state_slots_max=min(slots, STATE_SLOTS),
        step_tokens_max=tokens,
        step_rows_max=min(rows, tokens),
        prompt_logprob_tokens_max=min(PROMPT_LOGPROB_TOKENS, tokens),
    )
    return variants_of(
        HfConfig(wanted.model),
        preparation,
        capability=wanted.capability,
        dtype=DTYPES.get(wanted.dtype),
        ranks=wanted.ranks,
        quantize=wanted.quantize,
        kv_dtype=KV_DTYPES[wanted.kv_dtype],
    )


def variants_of(
    hf: HfConfig,
    wanted: Preparation,
    *,
    capability: tuple[int, int],
    dtype: torch.dtype | None = None,
    ranks: int = 1,
    quantize: str = "",
    kv_dtype: torch.dtype | None = None,
) -> list[Variant]:
    """Returns every kernel that preparing an engine launches, each once.

    Args:
        dtype: of activations and weights; None takes what such a device would.
        quantize: see `quant.detect`.
        kv_dtype: of the KV cache, where that is not `dtype`.
    """
    device: Device = AbsentDevice(capability, MULTIPROCESSORS)
    dtype = dtype or device.default_dtype(spec_of(hf).checkpoint_dtype).dtype
    with untraced(), standing_in(capability), recording() as found, torch.inference_mode():
        # The first rank draws; a bias that is added once is the first rank's.
        for rank in range(min(ranks, 2)):
            place = Place(rank, ranks)
            prepare_engine(_engine(hf, device, (dtype, kv_dtype), place, quantize), wanted)
    return found


def _engine(
    hf: HfConfig,
    device: Device,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    place: Place,
    quantize: str = "",
) -> Engine:
    dtype, kv_dtype = dtypes
    table = ops.select(spec_of(hf).op_spec(dtype, place.size, kv_dtype=kv_dtype), device)
    model = outline_model(hf, device=device, dtype=dtype, comm=place, ops=table, quantize=quantize)
    return engine_of(
        *(model, table),
        device=device,
        comm=place,
        dtype=dtype,
        kv_dtype=kv_dtype,
        graphs=True,
    )


@contextmanager
def standing_in(capability: tuple[int, int]) -> Iterator[None]:
    """Has Triton compile for a device that need not exist, and launch nothing."""
    before = driver._active  # pyright: ignore[reportPrivateUsage]
    driver.set_active(_Driver(target_of(capability)))  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        driver._active = before  # pyright: ignore[reportPrivateUsage]


@contextmanager
def recording() -> Iterator[list[Variant]]:
    """Writes down what launches would compile, and compiles nothing; within `standing_in`."""
    found: list[Variant] = []
    stopped: list[tuple[dict[Any, Any], Any]] = []

    def note(*, key: Any, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        signature = tuple(compile["signature"].items())
        found.append(Variant(kernel, compile["specialization_data"], repr(signature)))
        compiled = kernel.device_caches[compile["device"]][0]
        compiled[key] = _NotCompiled()  # Later launches of the same end there.
        stopped.append((compiled, key))
        return True

    runtime = knobs.runtime
    before = runtime.jit_cache_hook
    runtime.jit_cache_hook = note  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        runtime.jit_cache_hook = before
        for compiled, key in stopped:
            compiled.pop(key, None)


@contextmanager
def untraced() -> Iterator[None]:
    """Keeps torch from importing its tracing compiler, which is a second of a start.

    Operations without memory import it at their first call, only to tell it that it is not to
    trace them.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    stand_in = ModuleType(name)
    vars(stand_in)["disable"] = lambda function, *_, **__: function
    sys.modules[name] = torch._dynamo = stand_in  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        del sys.modules[name], torch._dynamo


class _NotCompiled:
    """Stands for a kernel in a launch that does not happen."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        pass

    def run(self, *_: Any) -> None:
        pass


class _Driver:
    """What Triton asks of a driver to compile, and to launch what does nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        """A number a target: Triton remembers a device's target by it."""
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

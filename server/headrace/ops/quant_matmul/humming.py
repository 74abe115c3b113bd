"""Products with codes by humming, vLLM's library of quantized matrix products (`humming-kernels`).

The library compiles a kernel for a shape of weight and a range of rows, keeps it on disk, and
chooses tiles by rules of its own. It takes integers of four and eight bits and eight-bit floats in
groups of inputs, with activations of 16 bits, and integers of four bits with rows of eight where
that is asked for. What it does not take goes to kernels of our own.
"""

# T tokens · Y outputs · I inputs · G groups of inputs

from __future__ import annotations

import importlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.device.cpu import usable_cores
from headrace.ops.base import No, OpSpec, Yes
from headrace.ops.quant_matmul.base import CodedWeight, Kind
from headrace.ops.rows8 import Rows8, in_model_dtype
from headrace.ops.triton import CAPABILITY_MIN, FP8_CAPABILITY, PDL_CAPABILITY, gpu, why_not

if TYPE_CHECKING:
    from headrace.device.base import Device
    from headrace.ops.quant_matmul.triton import TritonCodedMatmul
    from headrace.ops.rows8.triton import TritonQuantizeRows

log = logging.getLogger(__name__)

_MODULE = "humming"
EIGHT = "float8e4m3"  # of activations, as the library has it
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Up to so many rows each kernel is for; the last serves all that are more.
ROW_ENDS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 8192)
# Of which both sides of a weight are multiples, and what outputs are filled up to; groups have at
# least so many inputs.
OUTPUTS_MULTIPLE, INPUTS_MULTIPLE, OUTPUTS_FILLED, GROUP_MIN = 32, 128, 128, 32
# Of locks with which programs share a sum; the library asks for no more at these shapes.
LOCKS = 1 << 14
# Kinds of weights that a layer has: their kernels are compiled at one time.
SIDE_BY_SIDE = 4


@dataclass(eq=False)
class Hummed:
    """A weight as the library has rearranged it.

    Attributes:
        layer: what the library knows it by.
        tuning: the kernel of each range of rows.
        tensors: weight, weight_scale and, where there are any, zero_point.
        rows8: whether it is multiplied with rows of eight bits.
        kernels: those of all weights of its kind.
        other: the weight as our own kernels have it, where the library could not compile its own.
    """

    layer: str
    tuning: str
    tensors: dict[str, Tensor]
    outputs: int
    rows8: bool
    kernels: Kernels
    other: Any = None


@dataclass(eq=False)
class Kernels:
    """Those of a kind of weight, while they are compiled and after.

    Attributes:
        compiled: holds the error if that fails.
        first: the weight that asked for them, and what was made of it, until that is known.
    """

    tuning: str
    compiled: Future[None]
    first: tuple[CodedWeight, Hummed] | None = None


# What it raises where it has no headers to compile with, or no rule for a shape.
FAILURES = (AssertionError, OSError, RuntimeError, ValueError)


def sentence(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).splitlines() or ["no reason given"]
    return f"{type(error).__name__}: {lines[0]}"


def in_background(call: Callable[[], Any]) -> Future[None]:
    """Calls in a thread of its own."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="kernels", daemon=True).start()
    return done


class Library:
    """What is called of it."""

    def __init__(self) -> None:
        def load(name: str) -> Any:
            return importlib.import_module(f"{_MODULE}.{name}")

        with _importing():
            self.multiply = load("ops").humming_gemm
            self.dtype = load("dtypes").DataType.from_str
            self.schema = load("schema").HummingWeightSchema
            self.input_schema = load("schema").HummingInputSchema
            self.transform = load("transform").prepare_and_transform_humming_tensors
            self.tune = load("tune").get_heuristics_config
            self.compile = load("kernel.humming").HummingKernel.prepare_kernels
            # The library's own rule says one where it may start no processes at its import.
            workers = max(1, usable_cores() // SIDE_BY_SIDE)
            load("jit.runtime").get_parallel_build_workers = lambda: workers


@contextmanager
def _importing() -> Iterator[None]:
    """What is imported meanwhile does not load PyTorch's compiler.

    The library marks two functions for it, and the mark alone imports it: five seconds of a start,
    for what is never compiled here.
    """
    mark = torch.compiler.assume_constant_result
    torch.compiler.assume_constant_result = lambda fn: fn
    try:
        yield
    finally:
        torch.compiler.assume_constant_result = mark


class Humming:
    """The candidate."""

    name = "humming"

    def supports(self, spec: OpSpec, device: Device) -> Yes | No:
        # Importing the library takes seconds; models without codes never do.
        newest = FP8_CAPABILITY if spec.rows8 else CAPABILITY_MIN
        refusal = why_not(device, newest) if spec.coded else "the model has no codes"
        if refusal is None and spec.dtype not in _DTYPES:
            refusal = f"has no {spec.dtype} path"
        if refusal is None and find_spec(_MODULE) is None:
            refusal = "humming-kernels is not installed"
        if refusal is None and device.torch_device.type != "cuda":
            refusal = "compiles on the device itself"
        if refusal is None:
            try:
                Library()
            except (ImportError, OSError, RuntimeError) as error:
                refusal = f"`{_MODULE}` cannot be imported: {str(error).splitlines()[0]}"
        if refusal is not None:
            return No(refusal)
        return Yes("codes multiplied on the tensor cores, whatever the number of rows")

    def build(self, spec: OpSpec, device: Device) -> HummingCodedMatmul:
        from headrace.ops.quant_matmul.triton import TritonCodedMatmul
        from headrace.ops.rows8.triton import TritonQuantizeRows

        made = TritonCodedMatmul(gpu(device), spec.dtype)
        quantize = TritonQuantizeRows(gpu(device)) if spec.rows8 else None
        return HummingCodedMatmul(spec.dtype, device.capability, made, quantize)


class HummingCodedMatmul:
    """See `CodedMatmul`."""

    def __init__(
        self,
        dtype: torch.dtype,
        capability: tuple[int, int],
        others: TritonCodedMatmul,
        quantize: TritonQuantizeRows | None = None,
    ) -> None:
        """
        Args:
            others: where weights go that the library does not take.
            quantize: rounds activations that integers of four bits are multiplied with, where no
                layer before has; None: those keep 16 bits.
        """
        self._dtype = dtype
        self._quantize = quantize
        self._capability = capability
        self._others = others
        self._library = Library()
        self._locks: Tensor | None = None
        self._kernels: dict[str, Kernels] = {}
        # Shapes that go to our own kernels for a reason that was told.
        self._told: set[tuple[Kind, int, int]] = set()

    def pack(self, weight: CodedWeight) -> Any:
        """See `CodedMatmul`. The first weight of a kind does not wait for its kernels, so that
        those of a layer's weights are compiled side by side; the second one does."""
        shape = (weight.kind, weight.outputs, weight.columns)
        if self._others.takes_rows8_of(weight) or shape in self._told:
            return self._others.pack(weight)
        why = refusal(weight)
        if why is None:
            if self._locks is None:
                self._locks = torch.zeros(LOCKS, dtype=torch.int32, device=weight.codes.device)
            try:
                return self._hum(weight)
            except FAILURES as error:
                self._tell(weight, sentence(error))
        elif self._rounds(weight):
            self._tell(weight, why)
        return self._others.pack(weight)

    def _tell(self, weight: CodedWeight, why: str) -> None:
        """Warns, once for each shape, that a weight goes to our own kernels."""
        shape = (weight.kind, weight.outputs, weight.columns)
        if shape not in self._told:
            log.warning(
                "%s products of %d outputs and %d inputs go to our own kernels%s: %s",
                *(weight.kind.value, weight.outputs, weight.columns),
                ", and their activations keep 16 bits" if self._rounds(weight) else "",
                why,
            )
        self._told.add(shape)

    def _rounds(self, weight: CodedWeight) -> bool:
        """Whether rows of eight bits were asked for beside this weight."""
        return self._quantize is not None and weight.kind == Kind.INT4

    def takes_rows8(self, packed: Any) -> bool:
        return packed.rows8 if isinstance(packed, Hummed) else self._others.takes_rows8(packed)

    def apply(self, x_TI: Tensor | Rows8, packed: Any, bias_Y: Tensor | None) -> Tensor:
        if isinstance(packed, Hummed):
            if packed.kernels.first is not None:
                self._await_kernels(packed.kernels)
            packed = packed if packed.other is None else packed.other
        if not isinstance(packed, Hummed):
            return self._others.apply(x_TI, packed, bias_Y)
        wide = self._dtype if isinstance(x_TI, Rows8) else x_TI.dtype
        scale_T1 = None
        if packed.rows8:
            rows = x_TI if isinstance(x_TI, Rows8) else self._rounded(x_TI)
            x_TI, scale_T1 = rows.codes_TX, rows.scale_T[:, None]
        else:
            x_TI = in_model_dtype(x_TI).to(self._dtype).contiguous()
        y_TY = torch.empty((x_TI.shape[0], packed.outputs), dtype=self._dtype, device=x_TI.device)
        self._library.multiply(
            layer_config=packed.layer,
            tuning_config=packed.tuning,
            inputs=x_TI,
            input_scale=scale_T1,
            outputs=y_TY,
            locks=self._locks,
            **packed.tensors,
        )
        if bias_Y is not None:
            y_TY += bias_Y
        return y_TY if wide == self._dtype else y_TY.to(wide)

    def _rounded(self, x_TI: Tensor) -> Rows8:
        assert self._quantize is not None, "rows of eight bits are multiplied where asked for"
        return self._quantize(x_TI.to(self._dtype))

    def _hum(self, weight: CodedWeight) -> Hummed:
        library = self._library
        rows8 = self._rounds(weight)
        kinds = {Kind.INT4: "uint4", Kind.INT8: "uint8"}
        kind = kinds.get(weight.kind) or str(weight.codes.dtype).replace("torch.float8_", "float8")
        groups = weight.scales_YG.shape[1]
        zeros = zero_point(weight)
        schema = library.schema(
            b_dtype=library.dtype(kind.removesuffix("fn")),
            bs_dtype=library.dtype(_DTYPES[self._dtype]),
            weight_scale_group_size=0 if groups == 1 else weight.group,
            has_zero_point=zeros is not None,
        )
        tensors = {
            "weight": weight.codes.contiguous().view(torch.uint8).view(torch.int32),
            "weight_scale": weight.scales_YG.to(self._dtype).contiguous(),
        }
        if zeros is not None:
            tensors["zero_point"] = zeros
        if zeros is None and weight.kind != Kind.FP8:
            schema, changed = schema.convert_symmetric_integer_weight(tensors)
            tensors |= changed
        layer, tensors = library.transform(
            tensors,
            shape_n=weight.outputs,
            shape_k=weight.columns,
            weight_schema=schema,
            input_schema=library.input_schema(a_dtype=library.dtype(EIGHT)) if rows8 else None,
            pad_n_to_multiple=OUTPUTS_FILLED,
            torch_dtype=self._dtype,
            device=weight.codes.device,
        )
        name = layer.to_str()
        kernels = self._kernels.get(name)
        is_first = kernels is None
        if kernels is None:
            tuning = json.dumps(self._tuning(layer))
            where = weight.codes.device
            compiled = in_background(lambda: library.compile(name, None, tuning, where))
            kernels = self._kernels[name] = Kernels(tuning, compiled)
        made = Hummed(name, kernels.tuning, tensors, weight.outputs, rows8, kernels)
        # Whether a weight takes rows of eight bits is asked when it is packed: such a one waits.
        if is_first and not rows8:
            kernels.first = weight, made
        else:
            self._await_kernels(kernels)
            kernels.compiled.result()
        return made

    def _await_kernels(self, kernels: Kernels) -> None:
        """Returns when they are compiled; where that failed, the first weight is packed anew."""
        if kernels.first is None:
            return
        weight, made = kernels.first
        error = kernels.compiled.exception()
        kernels.first = None
        if error is None:
            return
        if not isinstance(error, FAILURES):
            raise error
        self._tell(weight, sentence(error))
        made.tensors, made.other = {}, self._others.pack(weight)

    def _tuning(self, layer: Any) -> list[tuple[int, int, dict[str, Any]]]:
        """Returns the library's choice for each range of rows: (rows below it, its last, how)."""
        ranges: list[tuple[int, int, dict[str, Any]]] = []
        below = 0
        for rows in ROW_ENDS:
            how = dict(self._library.tune(layer, shape_m=rows))
            how["use_pdl"] = self._capability >= PDL_CAPABILITY
            ranges.append((below, 1 << 30 if rows == ROW_ENDS[-1] else rows, how))
            below = rows
        return ranges


def refusal(weight: CodedWeight) -> str | None:
    """Why the library is not given a weight, or None."""
    if weight.values is not None:
        return "codes stand for values of a table"
    if weight.outputs % OUTPUTS_MULTIPLE or weight.columns % INPUTS_MULTIPLE:
        return (
            f"{weight.outputs} outputs and {weight.columns} inputs are no multiples of "
            f"{OUTPUTS_MULTIPLE} and {INPUTS_MULTIPLE}"
        )
    groups = weight.scales_YG.shape[1]
    if groups > 1 and (weight.group < GROUP_MIN or weight.columns % weight.group):
        return f"{weight.columns} inputs are no whole groups of {GROUP_MIN} or more"
    if weight.kind == Kind.INT8 and zero_point(weight) is not None:
        return "integers of eight bits have zero points"
    return None


def zero_point(weight: CodedWeight) -> Tensor | None:
    """Returns zero points as the library has them, int32 [Y bits / 32, G]; None where all are in
    the middle, which the library takes for granted."""
    if weight.zeros_YG is None:
        return None
    bits = 4 if weight.kind == Kind.INT4 else 8
    if bool((weight.zeros_YG == 1 << (bits - 1)).all()):
        return None
    per = 32 // bits
    parted = weight.zeros_YG.to(torch.int64).view(-1, per, weight.zeros_YG.shape[1])
    shifts = torch.arange(0, 32, bits, device=parted.device)[None, :, None]
    words = (parted << shifts).sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()

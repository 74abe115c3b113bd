"""Products with coded weights by humming, on a device."""

# T tokens · Y outputs · I inputs

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from coded_weights import coded, here, numbers_of, rows_of
from device_here import DEVICE, device_gpu

from conftest import CUDA
from headrace.device import open_device
from headrace.device.absent import AbsentDevice
from headrace.ops.base import No, OpSpec, Yes
from headrace.ops.quant_matmul import humming
from headrace.ops.quant_matmul.base import CodedWeight, Kind
from headrace.ops.quant_matmul.humming import (
    ROW_ENDS,
    Hummed,
    Humming,
    HummingCodedMatmul,
    refusal,
    zero_point,
)
from headrace.ops.quant_matmul.triton import TritonCodedMatmul
from headrace.ops.rows8.reference import quantize_rows
from headrace.ops.rows8.triton import TritonQuantizeRows

SPEC = OpSpec(
    heads=8,
    kv_heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    norm_eps=1e-5,
    coded=frozenset({Kind.INT4.value}),
)


def symmetric(weight: CodedWeight) -> CodedWeight:
    """The weight with every zero point in the middle."""
    assert weight.zeros_YG is not None
    middle = 8.0 if weight.kind == Kind.INT4 else 128.0
    return replace(weight, zeros_YG=torch.full_like(weight.zeros_YG, middle))


def made(dtype: torch.dtype, rows8: bool = False) -> HummingCodedMatmul:
    """The library's products on this device, or a skip that says why there are none."""
    if not CUDA:
        pytest.skip("humming multiplies on CUDA devices")
    device = open_device("cuda", 0)
    spec = replace(SPEC, dtype=dtype, rows8=rows8)
    answer = Humming().supports(spec, device)
    if not isinstance(answer, Yes):
        pytest.skip(answer.why)
    return Humming().build(spec, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("kind", "middle", "outputs", "inputs", "group"),
    [
        ("int4", True, 256, 512, 128),
        ("int4", False, 320, 512, 128),
        ("int4", False, 192, 384, 32),
        ("int4", True, 128, 256, 256),
        ("int8", True, 256, 512, 512),
        ("int8", True, 192, 384, 128),
        ("e4m3", True, 256, 512, 128),
    ],
)
def test_products_are_those_of_the_numbers(
    kind: str, middle: bool, outputs: int, inputs: int, group: int, dtype: torch.dtype
) -> None:
    matmul = made(dtype)
    weight = coded(kind, outputs, inputs, group)
    if middle and weight.zeros_YG is not None:
        weight = symmetric(weight)
    packed = matmul.pack(here(weight))
    assert isinstance(packed, Hummed) and not matmul.takes_rows8(packed)
    numbers_YI = numbers_of(weight)
    for rows in (1, 7, *ROW_ENDS[1:6], 700):
        x_TI = rows_of(rows, inputs, dtype)
        bias_Y = torch.randn(outputs).to(dtype)
        y_TY = matmul.apply(x_TI.to(DEVICE), packed, bias_Y.to(DEVICE))
        expected_TY = x_TI.double() @ numbers_YI.T + bias_Y.double()
        assert y_TY.shape == expected_TY.shape and y_TY.dtype == dtype
        # Scales are rounded to the dtype, each by itself; sums and the result once more.
        bound = (1e-2 if dtype == torch.bfloat16 else 2e-3) * float(expected_TY.abs().max())
        torch.testing.assert_close(y_TY.cpu().double(), expected_TY, rtol=0, atol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "middle"), [("int4", True), ("int4", False), ("int8", True)])
def test_rows_of_eight_bits_are_multiplied_with_four_where_asked(kind: str, middle: bool) -> None:
    matmul = made(torch.bfloat16, rows8=True)
    weight = coded(kind, 256, 512, 128)
    weight = symmetric(weight) if middle else weight
    packed = matmul.pack(here(weight))
    assert isinstance(packed, Hummed) and matmul.takes_rows8(packed) == (kind == "int4")
    for rows in (1, 7, 33, 130, 700):
        x_TI = rows_of(rows, 512, torch.bfloat16).to(DEVICE)
        rounded = quantize_rows(x_TI)
        expected_TI = rounded.widened() if kind == "int4" else x_TI
        expected_TY = expected_TI.cpu().double() @ numbers_of(weight).T
        y_TY = matmul.apply(x_TI, packed, None).cpu().double()
        # A number half way between two of eight bits may fall to either side. Rows that are not
        # rounded at all are further away: by 0.025, what e4m3 loses.
        assert (y_TY - expected_TY).norm() <= 0.015 * expected_TY.norm()
        if kind == "int4":
            y_TY = matmul.apply(rounded, packed, None).cpu().double()
            bound = 1e-2 * float(expected_TY.abs().max())
            torch.testing.assert_close(y_TY, expected_TY, rtol=0, atol=bound)


@pytest.mark.gpu
def test_what_the_library_does_not_take_goes_to_our_kernels() -> None:
    matmul = made(torch.bfloat16)
    for weight in (coded("nf4", 128, 256, 64), coded("int4", 70, 256, 64)):
        packed = matmul.pack(here(weight))
        assert not isinstance(packed, Hummed)
        x_TI = rows_of(5, 256, torch.bfloat16)
        y_TY = matmul.apply(x_TI.to(DEVICE), packed, None)
        expected_TY = x_TI.double() @ numbers_of(weight).T
        bound = 2.5e-2 * float(expected_TY.abs().max())
        torch.testing.assert_close(y_TY.cpu().double(), expected_TY, rtol=0, atol=bound)


def test_models_without_codes_do_not_load_the_library() -> None:
    answer = Humming().supports(replace(SPEC, coded=frozenset()), AbsentDevice((9, 0), 132))
    assert isinstance(answer, No) and answer.why == "the model has no codes"


def test_refusals_name_what_does_not_fit() -> None:
    assert refusal(coded("int4", 128, 256, 64)) is None
    assert "table" in (refusal(coded("nf4", 128, 256, 64)) or "")
    assert "multiples" in (refusal(coded("int4", 70, 256, 64)) or "")
    assert "whole groups" in (refusal(coded("int4", 128, 256, 16)) or "")
    assert "zero points" in (refusal(coded("int8", 128, 256, 64)) or "")


def test_zero_points_are_eight_a_word_down_the_outputs() -> None:
    weight = coded("int4", 64, 128, 32)
    words = zero_point(weight)
    assert words is not None and words.shape == (8, 4) and weight.zeros_YG is not None
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    for output in range(64):
        stored = (unsigned[output // 8] >> 4 * (output % 8)) & 15
        assert torch.equal(stored.float(), weight.zeros_YG[output])
    assert zero_point(symmetric(weight)) is None


MARKED = """
import torch

@torch.compiler.assume_constant_result
def humming_gemm():
    return 1
"""


def test_importing_the_library_leaves_pytorchs_compiler_out(tmp_path: Path) -> None:
    names = {
        "ops": MARKED,
        "dtypes": "class DataType:\n    from_str = None",
        "schema": "HummingWeightSchema = HummingInputSchema = None",
        "transform": "prepare_and_transform_humming_tensors = None",
        "tune": "get_heuristics_config = None",
        "jit/runtime": "def get_parallel_build_workers():\n    return 0",
        "kernel/humming": "class HummingKernel:\n    prepare_kernels = None",
    }
    for name, text in names.items():
        path = tmp_path / "humming" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    script = (
        "import sys, torch\n"
        "from headrace.ops.quant_matmul.humming import Library\n"
        "mark = torch.compiler.assume_constant_result\n"
        "assert Library().multiply() == 1\n"
        "assert torch.compiler.assume_constant_result is mark\n"
        "from humming.jit import runtime\n"
        "assert runtime.get_parallel_build_workers() >= 1\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


class Broken:
    """A library that cannot compile."""

    def dtype(self, name: str) -> str:
        return name

    def schema(self, **fields: object) -> object:
        raise RuntimeError("Could not locate the NVRTC library in CUDA path\nmore")


def assert_multiplies(matmul: HummingCodedMatmul, packed: object, weight: CodedWeight) -> None:
    """In float16, as the weight's numbers do."""
    x_TI = rows_of(3, weight.columns, torch.float16)
    y_TY = matmul.apply(x_TI.to(DEVICE), packed, None)
    expected_TY = x_TI.double() @ numbers_of(weight).T
    bound = 4e-3 * float(expected_TY.abs().max())
    torch.testing.assert_close(y_TY.cpu().double(), expected_TY, rtol=0, atol=bound)


def test_what_the_library_cannot_compile_goes_to_our_kernels_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(humming, "Library", Broken)
    ours = TritonCodedMatmul(device_gpu(), torch.float16)
    matmul = HummingCodedMatmul(torch.float16, (9, 0), ours)
    weight = coded("int4", 64, 256, 128)
    for _ in range(2):
        assert_multiplies(matmul, matmul.pack(here(weight)), weight)
    assert [record.getMessage() for record in caplog.records] == [
        "int4_matmul products of 64 outputs and 256 inputs go to our own kernels: "
        "RuntimeError: Could not locate the NVRTC library in CUDA path"
    ]


class Named:
    """What the library calls a weight, by its sides."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self._name = f"{outputs} x {inputs}"

    def to_str(self) -> str:
        return self._name


class Compiling(Broken):
    """A library whose kernels are compiled side by side or not at all."""

    def __init__(self, together: int, error: Exception | None = None) -> None:
        self._all = threading.Barrier(together, timeout=20)
        self._error = error
        self.compiled: list[str] = []

    def schema(self, **fields: object) -> object:
        return fields

    def input_schema(self, **fields: object) -> object:
        return fields

    def transform(self, tensors: object, **fields: int) -> tuple[Named, dict[str, torch.Tensor]]:
        del tensors
        return Named(fields["shape_n"], fields["shape_k"]), {}

    def tune(self, layer: Named, shape_m: int) -> dict[str, int]:
        del layer
        return {"block": shape_m}

    def compile(self, name: str, *rest: object) -> None:
        del rest
        self._all.wait()
        if self._error is not None:
            raise self._error
        self.compiled.append(name)

    def multiply(self, outputs: torch.Tensor, **rest: object) -> None:
        del rest
        outputs.fill_(7.0)


def compiled_by(
    library: Compiling, monkeypatch: pytest.MonkeyPatch, rows8: bool = False
) -> HummingCodedMatmul:
    monkeypatch.setattr(humming, "Library", lambda: library)
    gpu = device_gpu()
    ours, quantize = TritonCodedMatmul(gpu, torch.float16), TritonQuantizeRows(gpu)
    return HummingCodedMatmul(torch.float16, (9, 0), ours, quantize if rows8 else None)


def test_kernels_of_several_weights_are_compiled_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Compiling(together=2)
    matmul = compiled_by(library, monkeypatch)
    weights = [here(coded("int4", outputs, 256, 128)) for outputs in (64, 96)]
    made = [matmul.pack(weight) for weight in (*weights, *weights)]
    # The barrier lets neither end before both have begun; second weights have waited for theirs.
    assert sorted(library.compiled) == ["64 x 256", "96 x 256"]
    assert all(isinstance(packed, Hummed) for packed in made)
    y_TY = matmul.apply(rows_of(3, 256, torch.float16).to(DEVICE), made[0], None)
    assert y_TY.shape == (3, 64) and bool((y_TY == 7.0).all())


def test_a_product_waits_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Compiling(together=1)
    matmul = compiled_by(library, monkeypatch)
    packed = matmul.pack(here(coded("int4", 64, 256, 128)))
    matmul.apply(rows_of(3, 256, torch.float16).to(DEVICE), packed, None)
    assert library.compiled == ["64 x 256"]


def test_where_compiling_fails_the_first_weight_is_packed_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    matmul = compiled_by(Compiling(1, RuntimeError("no such instruction\nmore")), monkeypatch)
    weights = [coded("int4", 64, 256, 128, seed) for seed in range(3)]
    made = [matmul.pack(here(weight)) for weight in weights]
    assert [isinstance(packed, Hummed) for packed in made] == [True, False, False]
    for weight, packed in zip(weights, made, strict=True):
        assert_multiplies(matmul, packed, weight)
    assert [record.getMessage() for record in caplog.records] == [
        "int4_matmul products of 64 outputs and 256 inputs go to our own kernels: "
        "RuntimeError: no such instruction"
    ]


def test_where_compiling_fails_no_weight_is_said_to_take_rows_of_eight_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matmul = compiled_by(Compiling(1, RuntimeError("no such instruction")), monkeypatch, rows8=True)
    weight = coded("int4", 64, 256, 128)
    packed = matmul.pack(here(weight))
    assert not matmul.takes_rows8(packed)
    assert_multiplies(matmul, packed, weight)


def test_activations_that_keep_16_bits_against_the_flag_are_told_once_a_shape(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(humming, "Library", Broken)
    gpu = device_gpu()
    ours = TritonCodedMatmul(gpu, torch.float16)
    asked = HummingCodedMatmul(torch.float16, (9, 0), ours, TritonQuantizeRows(gpu))
    unasked = HummingCodedMatmul(torch.float16, (9, 0), ours)
    odd = here(coded("int4", 48, 256, 128))
    for matmul in (asked, asked, unasked):
        assert not matmul.takes_rows8(matmul.pack(odd))
    assert [record.getMessage() for record in caplog.records] == [
        "int4_matmul products of 48 outputs and 256 inputs go to our own kernels, and their "
        "activations keep 16 bits: 48 outputs and 256 inputs are no multiples of 32 and 128"
    ]

"""The small Triton kernels against their references: interpreted here, for real on a device."""

# T tokens · D width · F mlp width · H query heads · K kv heads · E head dim · C = (H + 2K)·E
# N blocks · P tokens per block · S sequences · Z slots · W table entries · L positions

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from device_here import DEVICE, device_gpu
from late import hasty_copy, late_copy

from conftest import CUDA
from headrace.layers.rotary import RopeSpec, Rotary
from headrace.ops.decode_inputs import reference as decode_inputs_reference
from headrace.ops.decode_inputs.triton import TritonDecodeInputs
from headrace.ops.kv_write.base import CODES, KvScales
from headrace.ops.rms_norm import reference as rms_norm_reference
from headrace.ops.rms_norm.triton import TritonRmsNorm
from headrace.ops.rope import QkNorm, QkvLayout
from headrace.ops.rope import reference as rope_reference
from headrace.ops.rope.triton import TritonRope
from headrace.ops.rows8 import Rows8
from headrace.ops.rows8 import reference as rows8
from headrace.ops.rows8.triton import TritonQuantizeRows
from headrace.ops.silu_mul import reference as silu_mul_reference
from headrace.ops.silu_mul.triton import TritonSiluMul
from headrace.ops.triton import FP8_CAPABILITY, Gpu

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place where the reference rounds as we do (2^-7, 2^-10); float32 in another
# order, and with the device's approximate exponential.
ULP = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# The interpreter cuts off what a cast to bfloat16 leaves, devices round to nearest: it is allowed
# so many units more for each cast.
CAST = 0 if CUDA else 1
gpu = pytest.mark.gpu


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(actual: Tensor, expected: Tensor, relative: float, absolute: float) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=relative, atol=absolute)


NORM_SIZES = [(1, 1), (2, 64), (3, 577), (2, 3584)]
NORM_SIZES_GPU = [(1, 4096), (8, 4096), (300, 3584), (2048, 4096), (257, 576), (64, 16384)]


def check_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = (random(rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(width, dtype=dtype, seed=2)
    ops = TritonRmsNorm(device_gpu())
    expected = rms_norm_reference.rms_norm(x, weight, 1e-5)
    assert_near(ops.rms_norm(x, weight, 1e-5), expected, (2 + 2 * CAST) * ULP[dtype], 1e-6)
    normed, total = rms_norm_reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
    stream = residual.clone()
    normed_actual, total_actual = ops.add_rms_norm(x.clone(), stream, weight, 1e-5)
    assert total_actual is stream, "the residual stream stays where it is"
    assert_near(total_actual, total, CAST * ULP[dtype], 0)
    assert_near(normed_actual, normed, (2 + 3 * CAST) * ULP[dtype], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), NORM_SIZES)
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    check_norms(rows, width, dtype)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), NORM_SIZES_GPU)
def test_norms_at_real_sizes(rows: int, width: int, dtype: torch.dtype) -> None:
    check_norms(rows, width, dtype)


def test_norms_of_heads_and_of_views() -> None:
    x_THE = random(3, 10, 16, dtype=torch.bfloat16)[:, 2:7]
    weight_E = random(16, dtype=torch.bfloat16, seed=1)
    expected = rms_norm_reference.rms_norm(x_THE, weight_E, 1e-6)
    actual = TritonRmsNorm(device_gpu()).rms_norm(x_THE, weight_E, 1e-6)
    assert_near(actual, expected, (1 + 2 * CAST) * ULP[torch.bfloat16], 1e-6)


def check_gated_activation(tokens: int, width: int, dtype: torch.dtype) -> None:
    gate_up = random(tokens, 2 * width, dtype=dtype) * 6
    actual = TritonSiluMul(device_gpu())(gate_up)
    assert_near(actual, silu_mul_reference.silu_mul(gate_up), 2 * ULP[dtype], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 130), (2, 1536), (65, 7)])
def test_gated_activations(tokens: int, width: int, dtype: torch.dtype) -> None:
    check_gated_activation(tokens, width, dtype)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 65, 2048])
def test_gated_activations_at_real_sizes(tokens: int, dtype: torch.dtype) -> None:
    check_gated_activation(tokens, 14336, dtype)


def test_gates_far_from_zero_neither_overflow_nor_vanish() -> None:
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0], device=DEVICE)
    gate_up = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    actual = TritonSiluMul(device_gpu())(gate_up)
    torch.testing.assert_close(actual[0], torch.tensor([0.0, 0.0, 90.0, 200.0], device=DEVICE))


def check_rope(tokens: int, layout: QkvLayout, dtype: torch.dtype, normed: bool) -> None:
    """Compares with the reference in float64: in float32 throughout, we round once."""
    block, dim, generator = 4, layout.head_dim, torch.Generator().manual_seed(3)
    blocks = tokens // block + 2
    qkv = random(tokens, layout.columns, dtype=dtype)
    positions = torch.randint(0, 131072, (tokens,), generator=generator)
    cos_sin = Rotary(RopeSpec(dim, theta=500000.0))(positions).to(DEVICE)
    cells = torch.randperm(blocks * block, generator=generator)[:tokens].to(DEVICE)
    q_weight, k_weight = (random(dim, dtype=dtype, seed=seed) for seed in (1, 2))
    shape = (2, blocks, block, layout.kv_heads, dim)

    wide_norm = QkNorm(q_weight.double(), k_weight.double(), 1e-5) if normed else None
    expected_caches = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    expected = wide_rope(qkv, cos_sin, expected_caches, cells, layout, wide_norm).to(dtype)

    caches = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    norm = QkNorm(q_weight, k_weight, 1e-5) if normed else None
    given = qkv.clone()
    q_THE = TritonRope(device_gpu()).rope_and_kv_write(
        given, cos_sin, caches[0], caches[1], cells, layout, norm
    )
    assert q_THE.data_ptr() == given.data_ptr(), "queries are rotated in place"
    assert_near(q_THE, expected, ULP[dtype], 4e-6)
    written, wanted = (c.flatten(1, 2)[:, cells] for c in (caches, expected_caches.to(dtype)))
    assert_near(written, wanted, ULP[dtype], 4e-6)
    everything_else = torch.ones(blocks * block, dtype=torch.bool, device=DEVICE)
    everything_else[cells] = False
    assert caches.flatten(1, 2)[:, everything_else].isnan().all()
    # Prefill reads fresh keys and values beside the queries.
    k_v = given[:, layout.heads * dim :].view(tokens, 2, layout.kv_heads, dim)
    assert torch.equal(k_v.transpose(0, 1), written)


def wide_rope(
    qkv: Tensor,
    cos_sin: Tensor,
    caches: Tensor,
    cells: Tensor,
    layout: QkvLayout,
    norm: QkNorm | None,
) -> Tensor:
    """The reference in float64 (but for its norm, which computes in float32)."""
    given = (qkv.double(), cos_sin.double(), caches[0], caches[1], cells, layout, norm)
    return rope_reference.rope_and_kv_write(*given)


LAYOUTS = [QkvLayout(9, 3, 64), QkvLayout(8, 1, 6), QkvLayout(5, 2, 80), QkvLayout(1, 1, 256)]
LAYOUTS_GPU = [QkvLayout(32, 8, 128), QkvLayout(14, 2, 64), QkvLayout(6, 6, 96)]


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rotation_and_cache_write(layout: QkvLayout, dtype: torch.dtype, normed: bool) -> None:
    check_rope(3, layout, dtype, normed)


@gpu
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, *LAYOUTS_GPU], ids=str)
@pytest.mark.parametrize("tokens", [1, 300])
def test_rotation_and_cache_write_at_real_sizes(
    tokens: int, layout: QkvLayout, dtype: torch.dtype, normed: bool
) -> None:
    check_rope(tokens, layout, dtype, normed)


def check_codes(qkv: Tensor, stored: torch.dtype, angle: int) -> None:
    """Writes rows of 4 query and 2 key and value heads of 32, and compares with the reference."""
    if DEVICE.type == "cuda" and stored == CODES[0] and device_gpu().capability < FP8_CAPABILITY:
        pytest.skip("the device has no float8_e4m3fn")
    layout, scales, tokens = QkvLayout(4, 2, 32), KvScales(0.25, 2.0**-6), len(qkv)
    cos_sin = Rotary(RopeSpec(32, theta=1e4))(torch.arange(tokens) * angle).to(DEVICE)
    cells = torch.randperm(tokens * 2, generator=torch.Generator().manual_seed(1))[:tokens]
    cells = cells.to(DEVICE)
    shape = (2, tokens, 2, layout.kv_heads, layout.head_dim)
    caches = torch.full(shape, 0x55, dtype=torch.uint8, device=DEVICE)
    TritonRope(device_gpu()).rope_and_kv_write(
        qkv.clone(), cos_sin, *caches.view(stored), cells, layout, None, scales
    )
    expected = torch.full_like(caches, 0x55)
    rope_reference.rope_and_kv_write(
        qkv.float(), cos_sin, *expected.view(stored), cells, layout, None, scales
    )
    ours, theirs = (codes.view(stored).float() for codes in (caches, expected))
    if angle == 0:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    else:
        # What is rotated in another order may lie on the other side of two codes' middle.
        assert ((ours == theirs) | ours.isnan() & theirs.isnan()).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", CODES, ids=str)
def test_caches_keep_codes_that_saturate(stored: torch.dtype, dtype: torch.dtype) -> None:
    """Of numbers that are codes times the scale: the interpreter neither rounds nor knows NaN."""
    generator = torch.Generator().manual_seed(2)
    numbers = torch.randint(-7, 8, (5, 8 * 32), generator=generator) / 4
    numbers[1, -1], numbers[2, -1] = 1000.0, -1000.0
    check_codes(numbers.to(DEVICE, dtype), stored, angle=0)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", CODES, ids=str)
def test_codes_are_rounded_to_nearest(stored: torch.dtype, dtype: torch.dtype) -> None:
    numbers = random(300, 8 * 32, dtype=dtype) * 3
    numbers[3, -2] = torch.nan
    check_codes(numbers, stored, angle=0)
    check_codes(random(300, 8 * 32, dtype=dtype) * 3, stored, angle=1)


@gpu
def test_cells_beyond_two_to_the_31_elements() -> None:
    """Where an offset of 32 bits wraps, the write lands 2^32 elements before its cell."""
    layout = QkvLayout(2, 2, 128)
    block, per_block = 16, 16 * 2 * 128
    blocks = 2**32 // per_block + 2  # 8 GiB of float16
    cells = torch.tensor([blocks * block - 1, 2**31 // (2 * 128), 5], device=DEVICE)
    qkv = random(3, layout.columns, dtype=torch.float16)
    cos_sin = torch.cat((torch.ones(3, 64), torch.zeros(3, 64)), dim=1).to(DEVICE)
    k, v = (
        torch.zeros((blocks, block, 2, 128), dtype=torch.float16, device=DEVICE) for _ in range(2)
    )
    q_THE = TritonRope(device_gpu()).rope_and_kv_write(
        qkv.clone(), cos_sin, k, v, cells, layout, None
    )
    k_v = qkv.view(3, 6, 128)
    assert torch.equal(q_THE, k_v[:, :2])
    assert torch.equal(k.flatten(0, 1)[cells], k_v[:, 2:4])
    assert torch.equal(v.flatten(0, 1)[cells], k_v[:, 4:])
    for cache in (k, v):
        cache.flatten(0, 1)[cells] = 0
        assert not cache.any(), "only the named cells may be written"


def check_decode_inputs(rows: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(4)
    slots, block, width, positions = rows + 3, 8, 5, 40
    slot_S = torch.randperm(slots, generator=generator)[:rows]
    start_S = torch.randint(0, positions, (rows,), generator=generator)
    slot_S[-1], start_S[-1] = slots, 0  # padding
    last_token_Z = torch.randint(0, 128256, (slots + 1,), generator=generator)
    table_ZW = torch.randint(2**29, 2**30, (slots + 1, width), generator=generator).to(torch.int32)
    table_ZW[slots] = 0
    cos_sin_LE = torch.randn((positions, dim), generator=generator)
    given = [t.to(DEVICE) for t in (slot_S, start_S, last_token_Z, table_ZW, cos_sin_LE)]
    expected = decode_inputs_reference.decode_inputs(*given, block)
    actual = TritonDecodeInputs(device_gpu())(*given, block)
    for name, value in expected._asdict().items():
        made = getattr(actual, name)
        assert made.dtype == value.dtype and torch.equal(made, value), name
    assert actual.cells_S[-1] == 0 and actual.kv_len_S[-1] == 1
    assert rows == 1 or (expected.cells_S > 2**31).any(), "cells need more than 32 bits"


@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (5, 128), (3, 6), (4, 80)])
def test_decode_inputs(rows: int, dim: int) -> None:
    check_decode_inputs(rows, dim)


def test_on_a_cpu_triton_is_not_even_imported() -> None:
    code = """
import sys, torch
from headrace.device.cpu import CpuDevice
from headrace.ops import OpSpec, select
table = select(OpSpec(2, 1, 8, torch.float32, 1e-5), CpuDevice(threads=1))
assert "not triton: runs on CUDA devices" in table.table(), table.table()
assert "triton" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE_ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@gpu
@pytest.mark.parametrize("rows", [1, 64, 512])
def test_decode_inputs_at_real_sizes(rows: int) -> None:
    check_decode_inputs(rows, 128)


@pytest.fixture
def hopper() -> Gpu:
    """A device with programmatic dependent launch."""
    gpu = device_gpu()
    if not gpu.pdl:
        pytest.skip("the device has no programmatic dependent launch")
    return gpu


def behind_a_late_write(
    inputs: list[Tensor],
    run: Callable[[list[Tensor]], list[Tensor]],
    poisoned: list[Tensor] | None = None,
) -> None:
    """Compares what `run` makes of inputs there already and of inputs that come late.

    The second time in a graph too, where a copy and a fill come before the late kernel.

    Args:
        run: launches one kernel before anything else, so that it is the late one's successor.
        poisoned: what `run` writes to and does not allocate.
    """
    expected = [t.clone() for t in run([t.clone() for t in inputs])]
    for late in range(len(inputs)):
        given = [t.clone() for t in inputs]
        for tensor in poisoned or []:
            tensor.fill_(torch.nan)
        # Zeros are not what was asked for, and never an index out of range.
        given[late].zero_()
        late_copy(inputs[late], given[late])
        for made, wanted in zip(run(given), expected, strict=True):
            assert torch.equal(made, wanted), f"input {late} was read before it was written"
    given = [t.clone() for t in inputs]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for source, target in zip(inputs[1:], given[1:], strict=True):
            target.copy_(source)
        for tensor in poisoned or []:
            tensor.fill_(torch.nan)
        given[0].zero_()
        late_copy(inputs[0], given[0])
        results = run(given)
    for _ in range(3):
        graph.replay()
        for made, wanted in zip(results, expected, strict=True):
            assert torch.equal(made, wanted), "a replay read before the write"


@gpu
def test_a_kernel_that_does_not_wait_reads_too_early(hopper: Gpu) -> None:
    """The control: the predecessor of the tests below does sleep, and the next one does start."""
    del hopper
    source, target = torch.ones(512, device=DEVICE), torch.zeros(512, device=DEVICE)
    hasty_copy(source)
    late_copy(source, target)
    target.zero_()
    torch.cuda.synchronize()
    late_copy(source, target)
    assert not hasty_copy(target).any()
    torch.cuda.synchronize()
    assert target.all()


@gpu
def test_norms_wait_for_what_they_read(hopper: Gpu) -> None:
    ops = TritonRmsNorm(hopper)
    weight = random(4096, dtype=torch.bfloat16, seed=2)
    inputs = [random(8, 4096, dtype=torch.bfloat16, seed=seed) for seed in (0, 1)]
    behind_a_late_write(inputs, lambda t: list(ops.add_rms_norm(t[0], t[1], weight, 1e-5)))
    behind_a_late_write(inputs[:1], lambda t: [ops.rms_norm(t[0], weight, 1e-5)])


@gpu
def test_activations_wait_for_what_they_read(hopper: Gpu) -> None:
    inputs = [random(8, 2 * 14336, dtype=torch.bfloat16)]
    behind_a_late_write(inputs, lambda t: [TritonSiluMul(hopper)(t[0])])


@gpu
def test_rows_of_eight_bits_wait_for_what_they_read(hopper: Gpu) -> None:
    norm, weight = TritonRmsNorm(hopper), random(4096, dtype=torch.bfloat16, seed=2)
    inputs = [random(8, 4096, dtype=torch.bfloat16, seed=seed) for seed in (0, 1)]

    def bits(rows: Rows8) -> list[Tensor]:
        return [rows.codes_TX.view(torch.uint8), rows.scale_T]

    behind_a_late_write(inputs[:1], lambda t: bits(TritonQuantizeRows(hopper)(t[0])))
    behind_a_late_write(inputs[:1], lambda t: bits(norm.rms_norm_8(t[0], weight, 1e-5)))
    behind_a_late_write(inputs, lambda t: bits(norm.add_rms_norm_8(t[0], t[1], weight, 1e-5)[0]))
    wide = [random(8, 2 * 14336, dtype=torch.bfloat16)]
    behind_a_late_write(wide, lambda t: bits(TritonSiluMul(hopper).rows8(t[0])))


@gpu
def test_rotations_wait_for_what_they_read(hopper: Gpu) -> None:
    layout = QkvLayout(32, 8, 128)
    qkv = random(8, layout.columns, dtype=torch.bfloat16)
    cos_sin = Rotary(RopeSpec(128, theta=500000.0))(torch.arange(100, 108)).to(DEVICE)
    cells = torch.arange(3, 11, device=DEVICE)
    weight = random(128, dtype=torch.bfloat16, seed=1)
    norm = QkNorm(weight, weight, 1e-5)

    caches = torch.zeros((2, 2, 16, 8, 128), dtype=torch.bfloat16, device=DEVICE)

    def run(given: list[Tensor]) -> list[Tensor]:
        q_THE = TritonRope(hopper).rope_and_kv_write(
            given[0], given[1], caches[0], caches[1], given[2], layout, norm
        )
        return [q_THE, caches.flatten(1, 2)[:, cells]]

    behind_a_late_write([qkv, cos_sin, cells], run, poisoned=[caches])


@gpu
def test_decode_inputs_wait_for_what_they_read(hopper: Gpu) -> None:
    slots = torch.tensor([3, 1, 4, 5], device=DEVICE)
    start = torch.tensor([9, 2, 6, 5], device=DEVICE)
    last_token = torch.arange(100, 106, device=DEVICE)
    table = torch.arange(1, 25, dtype=torch.int32, device=DEVICE).view(6, 4)
    cos_sin = torch.randn((10, 64), device=DEVICE)
    inputs = [slots, start, last_token, table, cos_sin]
    ops = TritonDecodeInputs(hopper)
    behind_a_late_write(inputs, lambda t: list(ops(t[0], t[1], t[2], t[3], t[4], 4)))


def assert_same_rows(actual: Rows8, expected: Rows8) -> None:
    torch.testing.assert_close(actual.scale_T, expected.scale_T, rtol=1e-6, atol=0)
    codes, wanted = actual.codes_TX.float(), expected.codes_TX.float()
    if CUDA:
        # A number half way between two may fall to either side: sums differ in their last bits.
        assert (codes != wanted).float().mean() < 1e-3
        torch.testing.assert_close(codes, wanted, rtol=0.13, atol=0.002)
    else:
        # Rounding up to a power of two, the interpreter forgets to raise the exponent.
        close = (codes - wanted).abs() <= 0.13 * wanted.abs() + 0.002
        assert (close | (codes == wanted / 2)).all()


@pytest.mark.parametrize("shape", [(1, 64), (3, 70), (5, 4096)])
def test_rows_of_eight_bits_are_the_reference_s(shape: tuple[int, int]) -> None:
    x_TX = random(*shape, dtype=torch.float16)
    x_TX[0, 1:] = 0
    assert_same_rows(TritonQuantizeRows(device_gpu())(x_TX), rows8.quantize_rows(x_TX))
    zeros = TritonQuantizeRows(device_gpu())(torch.zeros_like(x_TX))
    assert not zeros.widened().any()


@pytest.mark.parametrize("shape", [(1, 64), (3, 70), (5, 4096)])
def test_norms_end_in_rows_of_eight_bits(shape: tuple[int, int]) -> None:
    ops = TritonRmsNorm(device_gpu())
    x_TD, residual_TD = (random(*shape, dtype=torch.float16, seed=seed) for seed in (0, 1))
    weight_D = random(shape[1], dtype=torch.float16, seed=2)
    assert_same_rows(ops.rms_norm_8(x_TD, weight_D, 1e-5), rows8.rms_norm(x_TD, weight_D, 1e-5))
    expected, stream = rows8.add_rms_norm(x_TD, residual_TD, weight_D, 1e-5)
    actual, made = ops.add_rms_norm_8(x_TD, residual_TD, weight_D, 1e-5)
    assert_same_rows(actual, expected)
    assert torch.equal(made, stream)


@pytest.mark.parametrize("shape", [(1, 32), (3, 70), (2, 9000)])
def test_activations_end_in_rows_of_eight_bits(shape: tuple[int, int]) -> None:
    gate_up = random(shape[0], 2 * shape[1], dtype=torch.float16)
    assert_same_rows(TritonSiluMul(device_gpu()).rows8(gate_up), rows8.silu_mul(gate_up))

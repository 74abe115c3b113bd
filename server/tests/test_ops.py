"""Selecting operations, and every implementation of the small ones against its reference."""

# T tokens · D width · H query heads · K kv heads · E head dim · X inputs · Y outputs

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.device.absent import AbsentDevice
from headrace.device.cpu import CpuDevice
from headrace.ops import Choice, OpSpec, select
from headrace.ops.base import Candidate, No, Reference, Yes, choose
from headrace.ops.rope import QkNorm, QkvLayout

FOLDERS = "rms_norm reduce_norm rope silu_mul kv_write paged_attention matmul decode_inputs".split()
# Relative to the largest value: float32 in another order; one rounding to bfloat16 more or less.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(1, 1), (1, 64), (3, 7), (5, 577), (33, 130)]


def spec(dtype: torch.dtype, head_dim: int = 16) -> OpSpec:
    return OpSpec(heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, norm_eps=1e-5)


def pairs(op: str, dtype: torch.dtype) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, implementation, reference) of all that this machine can run."""
    *candidates, reference = importlib.import_module(f"headrace.ops.{op}").CANDIDATES
    device = CpuDevice(threads=2)
    for candidate in candidates:
        if isinstance(candidate.supports(spec(dtype), device), Yes):
            made = candidate.build(spec(dtype), device)
            yield candidate.name, made, reference.build(spec(dtype), device)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    bound = TOLERANCE[actual.dtype] * float(expected.float().abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=bound)


class Refuses:
    """A candidate that never fits."""

    name = "refuses"

    def supports(self, spec: OpSpec, device: Any) -> Yes | No:
        return No("no reason to")

    def build(self, spec: OpSpec, device: Any) -> Any:
        raise AssertionError


def test_the_first_that_fits_is_chosen_and_the_table_says_why_not_others() -> None:
    candidates: list[Candidate] = [Refuses(), Reference("made")]
    made, choice = choose("op", candidates, spec(torch.float32), CpuDevice(threads=1), False)
    assert made == "made"
    assert choice == Choice("op", "reference", "plain PyTorch", (("refuses", "no reason to"),))


def test_references_can_be_asked_for() -> None:
    table = select(spec(torch.float32), CpuDevice(threads=1), reference=True)
    assert [choice.op for choice in table.choices] == FOLDERS
    assert {choice.name for choice in table.choices} == {"reference"}
    assert len(table.table().splitlines()) == len(FOLDERS)


@pytest.mark.parametrize("op", FOLDERS)
def test_every_operation_ends_with_its_reference(op: str) -> None:
    candidates = importlib.import_module(f"headrace.ops.{op}").CANDIDATES
    assert isinstance(candidates[-1], Reference)
    names = [candidate.name for candidate in candidates]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual = (random(rows, width, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(width, dtype=dtype, seed=2)
    for _, made, reference in pairs("rms_norm", dtype):
        expected = reference.rms_norm(x, weight, 1e-5)
        assert_near(made.rms_norm(x.clone(), weight, 1e-5), expected)
        normed, total = reference.add_rms_norm(x, residual.clone(), weight, 1e-5)
        actual = made.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
        assert_near(actual[0], normed)
        assert torch.equal(actual[1], total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_gated_activations(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = random(rows, 2 * width, dtype=dtype) * 4
    for _, made, reference in pairs("silu_mul", dtype):
        assert_near(made(gate_up.clone()), reference(gate_up))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 64, 32), (1, 577, 33), (2, 576, 960), (3, 30, 7), (17, 96, 509), (70, 40, 65)],
)
def test_products(rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    x = random(rows, inputs, dtype=dtype)
    weight = random(outputs, inputs, dtype=dtype, seed=1)
    added = random(outputs, dtype=dtype, seed=2) if bias else None
    for _, made, _ in pairs("matmul", dtype):
        packed = made.pack(weight.clone())
        actual = made.apply(x, packed, added)
        assert actual.dtype == dtype
        expected = x.double() @ weight.double().T + (0 if added is None else added.double())
        assert_near(actual, expected)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (8, 1, 6), (2, 2, 128)])
def test_rotation_and_cache_write(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, normed: bool
) -> None:
    tokens, blocks, block = 5, 4, 3
    layout = QkvLayout(heads, kv_heads, head_dim)
    qkv = random(tokens, layout.columns, dtype=dtype)
    angles = torch.arange(tokens)[:, None] * torch.linspace(0, 2, head_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    cells = torch.tensor([7, 0, 11, 3, 4])
    q_weight, k_weight = (random(head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    norm = QkNorm(q_weight, k_weight, 1e-5) if normed else None

    def run(ops: Any) -> tuple[Tensor, Tensor]:
        caches = torch.full((2, blocks, block, kv_heads, head_dim), torch.nan, dtype=dtype)
        given = (qkv.clone(), cos_sin, caches[0], caches[1], cells, layout, norm)
        return ops.rope_and_kv_write(*given).clone(), caches.flatten(1, 2)

    for _, made, reference in pairs("rope", dtype):
        q_expected, expected = run(reference)
        q_actual, actual = run(made)
        assert_near(q_actual, q_expected)
        assert_near(actual[:, cells], expected[:, cells])
        others = [cell for cell in range(blocks * block) if cell not in cells.tolist()]
        assert actual[:, others].isnan().all(), "only the named cells may be written"
        x = qkv.view(tokens, -1, head_dim)
        assert_near(made.rope(x.clone(), cos_sin), reference.rope(x, cos_sin))


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), "reference"), ((8, 9), "triton")])
def test_eight_bit_floats_are_triton_s_where_it_converts_them(
    capability: tuple[int, int], fp8: str
) -> None:
    kinds = frozenset(["int4_matmul", "fp8_matmul"])
    table = select(replace(spec(torch.bfloat16), coded=kinds), AbsentDevice(capability, 108))
    chosen = {choice.op: choice.name for choice in table.choices}
    assert (chosen["int4_matmul"], chosen["fp8_matmul"]) == ("triton", fp8)

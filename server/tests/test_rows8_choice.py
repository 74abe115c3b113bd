"""Activations of eight bits beside codes of four: who multiplies them, and who refuses."""

# T tokens · I inputs

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from coded_weights import coded, numbers_of, rows_of
from test_config import example, shard

from headrace.config import Serve
from headrace.device.absent import AbsentDevice
from headrace.device.cpu import CpuDevice
from headrace.errors import ConfigError
from headrace.load import load_engine
from headrace.ops import OpSpec, select
from headrace.ops.base import No
from headrace.ops.quant_matmul import CANDIDATES, Kind
from headrace.ops.rows8.reference import quantize_rows
from headrace.testing.quantized import write

SPEC = OpSpec(
    heads=8,
    kv_heads=2,
    head_dim=64,
    dtype=torch.float32,
    norm_eps=1e-5,
    coded=frozenset({Kind.INT4.value, Kind.INT8.value}),
    rows8=True,
)


@pytest.mark.parametrize("reference", [False, True])
def test_the_reference_rounds_rows_beside_four_bits_and_no_others(reference: bool) -> None:
    table = select(SPEC, CpuDevice(1), reference)
    weight, x_TI = coded("int4", 24, 64, 32), rows_of(3, 64, torch.float32)
    four, eight = table.coded_matmul[Kind.INT4], table.coded_matmul[Kind.INT8]
    packed = four.pack(weight)
    assert four.takes_rows8(packed)
    rounded_TI = quantize_rows(x_TI).widened().double()
    y_TY = four.apply(x_TI, packed, None)
    expected_TY = rounded_TI @ numbers_of(weight).T
    torch.testing.assert_close(y_TY.double(), expected_TY, rtol=1e-4, atol=1e-4)
    assert (y_TY.double() - x_TI.double() @ numbers_of(weight).T).abs().max() > 1e-3
    assert not eight.takes_rows8(eight.pack(coded("int8", 24, 64, 32)))


def test_what_keeps_16_bits_says_so() -> None:
    for device in (CpuDevice(1), AbsentDevice((9, 0), 132)):
        answers = [c.supports(SPEC, device) for c in CANDIDATES[Kind.INT4][:-1]]
        assert all(isinstance(answer, No) for answer in answers)
    plain = replace(SPEC, rows8=False, dtype=torch.bfloat16)
    triton = next(c for c in CANDIDATES[Kind.INT4] if c.name == "triton")
    assert not isinstance(triton.supports(plain, AbsentDevice((9, 0), 132)), No)


def asked(folder: Path, reference_ops: bool = False) -> Serve:
    """A configuration that asks for activations of eight bits."""
    data = example()
    data["model"] |= {"path": str(folder), "quantize_activations": True}
    data["device"] |= {
        "kind": "cpu", "dtype": "float32", "threads": 1, "reference_ops": reference_ops,
    }  # fmt: skip
    data["shards"] = [shard(0)]
    return Serve.parse(data)


def test_the_flag_reaches_every_layer(tmp_path: Path) -> None:
    folder, _ = write("gptq", tmp_path)
    model = load_engine(asked(folder, reference_ops=True), 0).model
    block = model.blocks[0]
    assert block.attention.qkv.takes_rows8 and block.mlp.down.takes_rows8


def test_rows_in_an_order_of_their_own_are_rounded_after_they_are_ordered(tmp_path: Path) -> None:
    folder, _ = write("gptq-ordered", tmp_path)
    model = load_engine(asked(folder, reference_ops=True), 0).model
    down = model.blocks[0].mlp.down
    assert not down.takes_rows8
    weight_YI = down.method.dequantize()
    x_TI = rows_of(3, weight_YI.shape[1], torch.float32)
    expected_TY = quantize_rows(x_TI).widened() @ weight_YI.T
    torch.testing.assert_close(down(x_TI), expected_TY, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_done_is_refused_at_the_start(tmp_path: Path) -> None:
    folder, plain = write("gptq", tmp_path)
    with pytest.raises(ConfigError, match="humming: runs on CUDA devices"):
        load_engine(asked(folder), 0)
    with pytest.raises(ConfigError, match="weights are none: take a checkpoint of gptq"):
        load_engine(asked(plain), 0)
    serve = asked(plain, reference_ops=True)
    nf4 = replace(serve, model=replace(serve.model, quantize="bitsandbytes-nf4"))
    with pytest.raises(ConfigError, match="weights are bitsandbytes-nf4: take a checkpoint"):
        load_engine(nf4, 0)

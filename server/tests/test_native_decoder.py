"""The fused decoder (`ops/decoder`) against its slow twin, and both against the dense oracle."""

# T tokens · S rows · V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import models, native, ops
from headrace.comm.single import SingleComm
from headrace.device.cpu import CpuDevice
from headrace.models.fused import FusedDecoder, fuse
from headrace.native import Isa, Kernels
from headrace.ops import OpTable
from headrace.ops.base import No
from headrace.testing.oracle import Oracle
from headrace.testing.paged import PagedRunner, PagedSequence
from headrace.testing.tiny import Tiny

LOADED = native.load()
pytestmark = pytest.mark.skipif(
    isinstance(LOADED, str) or LOADED.best_isa == Isa.BASELINE, reason=str(LOADED)
)

# Of the largest logit. In bfloat16 the fused decoder rounds less often than its twin.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}

CHECKPOINTS = {
    "llama": Tiny(),
    "llama, one kv head": Tiny(heads=6, kv_heads=1, mlp_width=70, tied=True),
    "qwen2": Tiny("Qwen2ForCausalLM"),
    "qwen3": Tiny("Qwen3ForCausalLM", head_dim=32),
    "mistral, window": Tiny("MistralForCausalLM", config={"sliding_window": 9}),
}


@pytest.fixture(params=list(Isa), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Iterator[Isa]:
    """One instruction set forced."""
    assert isinstance(LOADED, Kernels)
    if request.param > LOADED.best_isa:
        pytest.skip(f"this CPU has no {request.param.name.lower()}")
    LOADED.set_isa(request.param)
    yield request.param
    LOADED.set_isa(None)


def both(folder: Path, dtype: torch.dtype) -> tuple[FusedDecoder, Any, OpTable]:
    """Returns the fused decoder, its twin of the same weights, and the twin's operations."""
    device = CpuDevice(threads=2)
    spec = models.read_spec(folder)
    table = ops.select(spec.op_spec(dtype, 1), device)
    model = models.load_model(
        folder, device=device, dtype=dtype, comm=SingleComm(), ops=table, load_format="auto"
    )
    composed = model.composed if isinstance(model, FusedDecoder) else model
    fused, why = fuse(composed, ranks=1)
    assert isinstance(fused, FusedDecoder), why
    return fused, composed, table


def steps(runner: PagedRunner) -> list[Tensor]:
    """Prefill, in chunks and mixed with decode, then decode alone."""
    a, b, c, d = (PagedSequence() for _ in range(4))
    ids = torch.randint(0, 500, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    return [
        runner.step([(a, ids[:17])]),
        runner.step([(a, [5]), (b, ids[:23])], every=True),
        runner.step([(b, ids[23:25]), (a, [7]), (c, ids[:1]), (d, ids[40:])]),
        runner.step([(a, [8]), (b, [9]), (c, [10]), (d, [11])]),
        runner.step([(c, [12])]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiny", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_fused_decoder_computes_what_the_composed_one_does(
    isa: Isa, tiny: Tiny, dtype: torch.dtype, tmp_path: Path
) -> None:
    fused, composed, table = both(tiny.write(tmp_path), dtype)
    # Cells that no token was written to hold NaN: a logit that saw one would be NaN.
    runners = [
        PagedRunner(model, table, dtype=dtype, block_tokens=4, fill=torch.nan)
        for model in (fused, composed)
    ]
    for actual_SV, expected_SV in zip(*(steps(runner) for runner in runners), strict=True):
        assert actual_SV.dtype == torch.float32
        bound = TOLERANCE[dtype] * float(expected_SV.abs().max())
        torch.testing.assert_close(actual_SV, expected_SV, rtol=0, atol=bound)


@pytest.mark.parametrize("tiny", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_fused_decoder_writes_the_oracles_tokens(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path)
    fused, _, table = both(folder, torch.float32)
    prompts = [[1, 44, 100, 7], list(range(3, 40))]
    runner = PagedRunner(fused, table, dtype=torch.float32)
    oracle = Oracle(folder)
    assert runner.greedy(prompts, 12) == [oracle.greedy(prompt, 12) for prompt in prompts]


def test_decoders_that_the_library_does_not_know_stay_composed(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    device = CpuDevice(threads=1)
    spec = models.read_spec(folder)
    table = ops.select(spec.op_spec(torch.float32, 1), device, reference=True)
    model = models.load_model(
        folder, device=device, dtype=torch.float32, comm=SingleComm(), ops=table, load_format="auto"
    )
    assert not isinstance(model, FusedDecoder)
    kept, why = fuse(model, ranks=1)
    assert kept is model
    assert why == No("the weights are not packed by the kernel library")
    assert fuse(model, ranks=2)[0] is model

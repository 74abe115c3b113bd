"""The fused decoder (`ops/decoder`) against its slow twin, and both against the dense oracle."""

# T tokens · S rows · V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from headrace import models, native, ops
from headrace.comm.single import SingleComm
from headrace.device.cpu import CpuDevice
from headrace.models import Decoder
from headrace.models.fused import fuse
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


def load(folder: Path, dtype: torch.dtype, reference: bool = False) -> tuple[Decoder, OpTable]:
    """Returns the decoder as the server loads it, and its operations."""
    device = CpuDevice(threads=2)
    table = ops.select(models.read_spec(folder).op_spec(dtype, 1), device, reference)
    model = models.load_model(
        folder, device=device, dtype=dtype, comm=SingleComm(), ops=table, load_format="auto"
    )
    return model, table


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
    model, table = load(tiny.write(tmp_path), dtype)
    assert model.whole_step is not None

    def run() -> list[Tensor]:
        # Cells that no token was written to hold NaN: a logit that saw one would be NaN.
        return steps(PagedRunner(model, table, dtype=dtype, block_tokens=4, fill=torch.nan))

    fused = run()
    model.whole_step = None
    for actual_SV, expected_SV in zip(fused, run(), strict=True):
        assert actual_SV.dtype == torch.float32
        bound = TOLERANCE[dtype] * float(expected_SV.abs().max())
        torch.testing.assert_close(actual_SV, expected_SV, rtol=0, atol=bound)


@pytest.mark.parametrize("tiny", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_fused_decoder_writes_the_oracles_tokens(tiny: Tiny, tmp_path: Path) -> None:
    folder = tiny.write(tmp_path)
    model, table = load(folder, torch.float32)
    prompts = [[1, 44, 100, 7], list(range(3, 40))]
    runner = PagedRunner(model, table, dtype=torch.float32)
    oracle = Oracle(folder)
    assert runner.greedy(prompts, 12) == [oracle.greedy(prompt, 12) for prompt in prompts]


def test_decoders_that_the_library_does_not_know_stay_composed(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    model, _ = load(folder, torch.float32, reference=True)
    assert model.whole_step is None
    assert fuse(model, ranks=1) == No("the weights are not packed by the kernel library")
    fusable, _ = load(folder, torch.float32)
    fusable.whole_step = None
    assert isinstance(fuse(fusable, ranks=2), No)
    assert fusable.whole_step is None

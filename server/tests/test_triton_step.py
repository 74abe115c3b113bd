"""Whole steps out of Triton kernels, in the interpreter and on recorded graphs: the CUDA path
without a GPU. The tokens are those of the reference operations."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from decoders import load
from planner import Planner
from test_graphs import run
from test_invariance import make_runner

from headrace.batch import GraphSizes
from headrace.comm import SingleComm
from headrace.device.cpu import CpuDevice
from headrace.graphs import buckets
from headrace.models import Decoder, load_model, read_spec
from headrace.ops import OpTable, select
from headrace.ops.decode_inputs.triton import TritonDecodeInputs
from headrace.ops.paged_attention.cuda import CudaAttention
from headrace.ops.paged_attention.triton_decode import TritonDecode
from headrace.ops.paged_attention.triton_prefill import TritonPrefill
from headrace.ops.rms_norm.triton import TritonRmsNorm
from headrace.ops.rope.triton import triton_rope_and_kv_write
from headrace.ops.silu_mul.triton import TritonSiluMul
from headrace.ops.triton import INTERPRETED
from headrace.runner import Runner
from headrace.testing.recording import RecordingDevice
from headrace.testing.tiny import Tiny
from headrace.wire import Sampling

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without CUDA"
)
MIXED = [Sampling(), Sampling(temperature=0.8, top_k=20, seed=3)]


def interpreted(folder: Path) -> tuple[Decoder, OpTable]:
    """A tiny model whose operations are the GPU's, but for the matrix product."""
    device = CpuDevice(threads=1)
    spec = read_spec(folder).op_spec(torch.float32, 1)
    norm = TritonRmsNorm(INTERPRETED)
    shape = spec.heads, spec.kv_heads, spec.head_dim, spec.dtype, INTERPRETED
    ops = replace(
        select(spec, device, reference=True),
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rope_and_kv_write=triton_rope_and_kv_write(INTERPRETED),
        silu_mul=TritonSiluMul(INTERPRETED),
        paged_attention=CudaAttention(
            TritonDecode(*shape, torch.device("cpu")), TritonPrefill(*shape)
        ),
        decode_inputs=TritonDecodeInputs(INTERPRETED),
    )
    model = load_model(
        folder, device=device, dtype=torch.float32, comm=SingleComm(), ops=ops, load_format="auto"
    )
    return model, ops


@torch.inference_mode()
def runner(folder: Path, block_tokens: int) -> Runner:
    model, ops = interpreted(folder)
    # Steps in pieces are recorded by torch's dispatch, which interpreted kernels do not pass.
    made = make_runner(
        *(model, ops, SingleComm(), block_tokens),
        device=RecordingDevice(),
        sizes=GraphSizes(rows=buckets(16)),
    )
    made.capture()
    return made


@pytest.mark.parametrize(
    ("architecture", "knobs"),
    [("LlamaForCausalLM", {"chunk": 7, "share": True}), ("Qwen3ForCausalLM", {})],
    ids=["llama, chunks", "qwen3"],
)
def test_tokens_are_those_of_the_reference(
    tmp_path: Path, architecture: str, knobs: dict[str, int]
) -> None:
    folder = Tiny(architecture, layers=1).write(tmp_path)
    planner = Planner(blocks=256, block_tokens=4, **knobs)
    model, ops = load(folder, reference=True)
    expected = run(make_runner(model, ops, SingleComm(), 4), planner, MIXED)
    actual = run(runner(folder, 4), replace(planner), MIXED)
    assert [s.tokens for s in actual] == [s.tokens for s in expected]

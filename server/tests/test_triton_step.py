"""Whole steps out of Triton kernels, in the interpreter and on recorded graphs: the CUDA path
without a GPU. The tokens are those of the reference operations."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from decoders import load
from planner import Planner, Sequence
from ranks import Rank, run_processes
from test_comm import seen
from test_graphs import run
from test_invariance import BLOCKS, PROMPTS, make_runner

from headrace.batch import GraphSizes
from headrace.comm import Comm, SingleComm
from headrace.device.cpu import CpuDevice
from headrace.engine import Preparation
from headrace.graphs import buckets
from headrace.load import engine_of
from headrace.models import Decoder, load_model, read_spec
from headrace.ops import OpTable, select
from headrace.ops.decode_inputs.triton import TritonDecodeInputs
from headrace.ops.paged_attention.cuda import CudaAttention
from headrace.ops.paged_attention.triton_decode import TritonDecode
from headrace.ops.paged_attention.triton_prefill import TritonPrefill
from headrace.ops.reduce_norm.triton import TritonReduceNorms
from headrace.ops.rms_norm.triton import TritonRmsNorm
from headrace.ops.rope.triton import triton_rope_and_kv_write
from headrace.ops.sampling.ranks import make as make_sampling
from headrace.ops.sampling.triton import Sizes, TritonSampling
from headrace.ops.silu_mul.triton import TritonSiluMul
from headrace.ops.triton import INTERPRETED
from headrace.prepare import graph_sizes
from headrace.runner import Runner
from headrace.testing.recording import RecordingDevice
from headrace.testing.tiny import Tiny
from headrace.wire import Plan, Result, Sampling

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without CUDA"
)
MIXED = [
    Sampling(),
    Sampling(temperature=0.8, top_k=20, seed=3),
    Sampling(temperature=0.9, seed=5),
    Sampling(temperature=0.9, seed=6, watermark=True),
]


def interpreted(folder: Path, comm: Comm) -> tuple[Decoder, OpTable]:
    """A tiny model whose operations are the GPU's, but for the matrix product."""
    device = CpuDevice(threads=1)
    spec = read_spec(folder).op_spec(torch.float32, comm.size)
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
        reduce_norm=TritonReduceNorms(INTERPRETED, torch.float32),
    )
    model = load_model(
        folder, device=device, dtype=torch.float32, comm=comm, ops=ops, load_format="auto"
    )
    return model, ops


@torch.inference_mode()
def runner(folder: Path, block_tokens: int) -> Runner:
    model, ops = interpreted(folder, SingleComm())
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


def few_requests() -> list[Sequence]:
    """One prompt both greedily and drawn, the others greedily."""
    return [
        Sequence(prompt, 4 + i % 3, kind)
        for i, prompt in enumerate(PROMPTS[:4])
        for kind in (MIXED if i == 0 else MIXED[:1])
    ]


WANTED = Preparation(
    first_step=0,
    block_tokens=4,
    slots_max=16,
    state_slots_max=16,
    step_tokens_max=512,
    step_rows_max=16,
)


@torch.inference_mode()
def drawn_by(rank: Rank, folder: Path) -> tuple[list[list[int]], int]:
    """What a rank of a group draws, and how many recorded launches it replayed."""
    model, ops = interpreted(folder, rank.comm)
    device = RecordingDevice()
    engine = engine_of(model, ops, device=device, comm=rank.comm, dtype=torch.float32, graphs=True)
    # The sampler of a CPU gathers logits; that of GPUs does not.
    sampling = TritonSampling(INTERPRETED, torch.from_numpy, Sizes(64, 64, 64))
    shared = make_sampling(
        *(sampling, INTERPRETED, rank.share, rank.size, engine.vocab_size, engine.vocab_columns)
    )
    engine = replace(engine, shared_sampling=shared)
    assert graph_sizes(engine, WANTED).rows, "a group with shared memory is recorded"
    made = Runner(engine, WANTED, BLOCKS, GraphSizes(rows=buckets(8)))
    made.capture()

    @torch.inference_mode()
    def execute(plan: Plan) -> Result:
        result = made.execute(plan)
        return result if rank.rank == 0 else seen(made, plan, result)

    requests = few_requests()
    Planner(blocks=256, block_tokens=4).run(execute, requests)
    return [request.tokens for request in requests], device.replayed


def test_ranks_that_share_memory_draw_what_one_draws(tmp_path: Path) -> None:
    folder = Tiny(layers=1, kv_heads=2).write(tmp_path)
    (mine, replayed), other = run_processes(2, drawn_by, folder)
    assert (mine, replayed) == other and replayed > 0
    model, ops = load(folder, reference=True)
    requests = few_requests()
    alone = make_runner(model, ops, SingleComm(), 4)

    @torch.inference_mode()
    def execute(plan: Plan) -> Result:
        return alone.execute(plan)

    Planner(blocks=256, block_tokens=4).run(execute, requests)
    assert mine == [request.tokens for request in requests]

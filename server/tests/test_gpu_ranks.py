"""Models divided over GPUs, graphs and all: the tokens of one device, and of the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from late import SLEEP_NS, late_copy
from planner import Planner, Sequence
from ranks import Rank, run_processes
from test_gpu_model import BLOCKS, LENGTHS, WANTED, WAYS, drawn, made, requests, start_again

from headrace.batch import GraphSizes
from headrace.device import open_device
from headrace.models import ARCHITECTURES
from headrace.ops.reduce_norm.reference import reduce_norm
from headrace.ops.reduce_norm.triton import TritonReduceNorm, TritonReduceNorms
from headrace.prepare import graph_sizes, prepare_engine
from headrace.runner import Runner
from headrace.testing import engine
from headrace.testing.tiny import Tiny
from headrace.wire import Plan, Result

SIZES = (2, 4)
pytestmark = pytest.mark.gpu
# bfloat16 sums in another order.
TOLERANCE = 0.15
# Numbers of a sum at most: 2,048 tokens of the widest tiny model.
RESERVED = 2048 * 512
CHAINED = 40
REPLAYS = 30
# What is left out where ranks take turns on fewer GPUs (see `ranks`): each sum waits for a turn.
WAYS_IN_TURNS = ("chunks", "preemption, depth 3, cache hits")
ARCHITECTURES_IN_TURNS = ("LlamaForCausalLM",)
GRAPHS_IN_TURNS = GraphSizes(rows=(4, 32), tokens=(64, 512))
REPLAYS_IN_TURNS = 6
EPS = 1e-5


def in_turns(size: int) -> bool:
    return torch.cuda.device_count() < size


def ways(size: int) -> dict[str, dict[str, Any]]:
    """Knobs of the planner that must not change a token."""
    return {name: WAYS[name] for name in WAYS_IN_TURNS} if in_turns(size) else WAYS


def known_to(rank: Rank, runner: Runner, plan: Plan, result: Result) -> Result:
    """A result as the planner wants it on every rank: other ranks' slots know the tokens, too."""
    if rank.rank == 0:
        return result
    rows = (plan.row_flags_S & 1).nonzero()[0]
    slots = torch.from_numpy(plan.row_slot_S[rows].astype("int64")).to(rank.device)
    result.token_id = runner.slots.last_tokens(slots).cpu().numpy()
    zeros = result.token_id * 0
    result.row_flags, result.top_count, result.logprob = zeros, zeros, zeros
    return result


@torch.inference_mode()
def tokens_of(rank: Rank, folders: list[Path]) -> list[Any]:
    """What a rank draws of each model, in every way."""
    found: list[Any] = []
    for folder in folders:
        loaded = engine.load(
            folder, open_device("cuda", rank.device.index), dtype=torch.float32, comm=rank.comm
        )
        sizes = graph_sizes(loaded, WANTED)
        assert sizes.rows, "a group of GPUs is recorded"
        rank.comm.reserve(RESERVED, torch.float32)  # What is recorded may not go through gloo.
        for knobs in ways(rank.size).values():
            runner = Runner(
                loaded, WANTED, BLOCKS, GRAPHS_IN_TURNS if in_turns(rank.size) else sizes
            )
            runner.capture()

            def execute(plan: Plan, runner: Runner = runner) -> Result:
                return known_to(rank, runner, plan, runner.execute(plan))

            asked = requests()
            Planner(blocks=BLOCKS, block_tokens=16, running_max=32, **knobs).run(execute, asked)
            found.append([request.tokens for request in asked])
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_float32_tokens_are_the_cpus(tmp_path: Path, size: int) -> None:
    folders, expected = [], []
    for architecture in ARCHITECTURES_IN_TURNS if in_turns(size) else ARCHITECTURES:
        windows = {"sliding_window": 10} if architecture == "MistralForCausalLM" else {}
        folders.append(Tiny(architecture, config=windows).write(tmp_path / architecture))
        expected += [drawn(made(folders[-1], "cpu", torch.float32), requests())] * len(ways(size))
    for rank, found in enumerate(run_processes(size, tokens_of, folders)):
        for index, (tokens, wanted) in enumerate(zip(found, expected, strict=True)):
            assert tokens == wanted, (rank, ARCHITECTURES, index)


@torch.inference_mode()
def told(rank: Rank, folder: Path, quantize: str = "") -> tuple[np.ndarray, int]:
    """Log-probabilities of prompts by a rank, and bytes that serving took after ready."""
    device = open_device("cuda", rank.device.index)
    loaded = engine.load(folder, device, comm=rank.comm, quantize=quantize)
    runner, _ = prepare_engine(loaded, replace(WANTED, blocks_max=BLOCKS))
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    found: list[np.ndarray] = []

    def execute(plan: Plan) -> Result:
        result = runner.execute(plan)
        found.append(np.nan_to_num(result.prompt_logprob))
        return known_to(rank, runner, plan, result)

    prompts = [[(7 * i + 3 * row) % 500 for i in range(length)] for row, length in LENGTHS]
    for ask in (True, False, False):
        asked = [Sequence(prompt, 3, prompt_logprobs=ask) for prompt in prompts]
        Planner(blocks=BLOCKS, block_tokens=16, running_max=32).run(execute, asked)
        start_again(runner)
    torch.cuda.synchronize()
    return np.concatenate(found), free - torch.cuda.mem_get_info()[0]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_logprobs_are_those_of_one_gpu(tmp_path: Path, size: int) -> None:
    tiny = Tiny(width=256, heads=8, kv_heads=4, head_dim=64, dtype=torch.bfloat16)
    folder = tiny.write(tmp_path)
    ((alone, _),) = run_processes(1, told, folder)
    results = run_processes(size, told, folder)
    np.testing.assert_allclose(results[0][0], alone, atol=TOLERANCE)
    if not in_turns(size):  # gloo, which stands in for NCCL, takes some.
        assert [taken for _, taken in results if taken > 0] == [], "memory was taken after ready"


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("quantize", "tolerance"),
    [
        # Each rank rounds rows of its own inputs to eight bits, by their own largest number.
        ("fp8", 0.5),
        ("eetq", TOLERANCE),
        ("bitsandbytes-nf4", TOLERANCE),
    ],
)
def test_quantized_logprobs_are_those_of_one_gpu(
    tmp_path: Path, quantize: str, tolerance: float
) -> None:
    tiny = Tiny(width=512, heads=8, kv_heads=4, head_dim=64, mlp_width=512, dtype=torch.bfloat16)
    folder = tiny.write(tmp_path)
    ((alone, _),) = run_processes(1, told, folder, quantize)
    results = run_processes(2, told, folder, quantize)
    np.testing.assert_allclose(results[0][0], alone, atol=tolerance)


def chain(rank: Rank, op: TritonReduceNorm, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """A graph of sums one behind another, which overlap, beside the reference over all shares."""
    width, dtype = 4096, torch.bfloat16
    random = torch.Generator(rank.device).manual_seed(rank.rank)
    same = torch.Generator(rank.device).manual_seed(77)
    weight_D = torch.randn(width, generator=same, device=rank.device).to(dtype)
    x = [torch.empty((rows, width), dtype=dtype, device=rank.device) for _ in range(CHAINED)]
    start = torch.empty((rows, width), dtype=dtype, device=rank.device)
    y: list[torch.Tensor] = []
    stream = start.clone()

    def run() -> None:
        y.clear()
        stream.copy_(start)
        for x_TD in x:
            y.append(op(x_TD, stream, weight_D, EPS)[0])

    run()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for replay in range(REPLAYS_IN_TURNS if in_turns(rank.size) else REPLAYS):
        start.copy_(torch.randn(start.shape, generator=same, device=rank.device))
        for x_TD in x:
            x_TD.copy_(torch.randn(x_TD.shape, generator=random, device=rank.device))
        if replay % 3 == rank.rank:  # Now one rank is late, now the other.
            torch.cuda._sleep(2_000_000)
        graph.replay()
        expected = start.clone()
        for x_TD, y_TD in zip(x, y, strict=True):
            partial_RTD = list(rank.comm.all_gather(x_TD[None], 0))
            normed, expected = reduce_norm(partial_RTD, expected, weight_D, EPS)
            torch.testing.assert_close(y_TD, normed, rtol=2.0**-6, atol=1e-6)
        assert torch.equal(stream, expected), f"replay {replay}: another stream"
        # The sum of many rows, which goes another way and adds in another order.
        summed = rank.comm.all_reduce(x[0].clone())
        wanted = rank.comm.all_gather(x[0][None], 0).float().sum(0)
        torch.testing.assert_close(summed.float(), wanted, rtol=2.0**-5, atol=2.0**-5)
        found.append((stream.float().cpu().numpy()[:1], y[-1].float().cpu().numpy()[:1]))
    return found


def chains(rank: Rank) -> list[Any]:
    op = TritonReduceNorms(rank.gpu, torch.bfloat16)(rank.comm.share, rank.size, 4096)
    assert isinstance(op, TritonReduceNorm)
    rank.comm.reserve(2048 * 4096, torch.bfloat16)
    found: list[Any] = [chain(rank, op, rows) for rows in (1, 8, op.rows_max)]
    # A predecessor that writes late, on one rank only.
    late = torch.zeros((4, 4096), dtype=torch.bfloat16, device=rank.device)
    source = torch.full_like(late, rank.rank + 1.0)
    weight_D = torch.ones(4096, dtype=torch.bfloat16, device=rank.device)
    for first in range(rank.size):
        late.zero_()
        torch.cuda.synchronize()
        if rank.rank == first:
            late_copy(source, late)
        else:
            late.copy_(source)
        _, stream = op(late, None, weight_D, EPS)
        assert (stream == rank.size * (rank.size + 1) / 2).all(), f"{SLEEP_NS} ns late"
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_sums_in_a_graph_are_the_references(size: int) -> None:
    results = run_processes(size, chains)
    for other in results[1:]:
        for mine, its in zip(results[0], other, strict=True):
            for pair in zip(mine, its, strict=True):
                np.testing.assert_array_equal(*pair)

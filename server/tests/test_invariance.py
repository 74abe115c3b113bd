"""A request's tokens depend on nothing but the request: not on how its steps are made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import load
from planner import Planner, Sequence

from headrace.batch import NO_GRAPHS, GraphSizes
from headrace.comm import Comm, SingleComm
from headrace.device import Device
from headrace.device.cpu import CpuDevice
from headrace.engine import Preparation
from headrace.load import engine_of
from headrace.models import ARCHITECTURES, Decoder
from headrace.ops import OpTable
from headrace.runner import Runner
from headrace.testing.threads import group
from headrace.testing.tiny import Tiny
from headrace.wire import Plan, Result, Sampling

BLOCKS = 1024
PREFIX = [1, 40, 41, 300, 43, 44, 45, 460, 47]  # shared: two blocks of four tokens, and one more
PROMPTS = [
    PREFIX,
    [*PREFIX, 9, 10, 11],
    [*PREFIX, 9, 500],
    [2],
    [7, 8] * 20,
    list(range(100, 130)),
]
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.9, seed=1),
    Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=2),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.2, watermark=True),
]


@dataclass(frozen=True)
class Way:
    """One way to make the steps."""

    planner: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    reference: bool = False
    alone: bool = False  # one request at a time
    kv_dtype: torch.dtype | None = None  # of the cache, where it keeps codes


WAYS = {
    "alone": Way(alone=True),
    "chunks of 1": Way({"chunk": 1, "running_max": 1}),
    "chunks of 5": Way({"chunk": 5}),
    "chunks of 16": Way({"chunk": 16, "depth": 3}),
    "few rows": Way({"running_max": 2}),
    "rows in another order": Way({"reverse": True}),
    "cache hits": Way({"share": True}),
    "cache hits in chunks": Way({"share": True, "chunk": 7}),
    "blocks of 1": Way({"block_tokens": 1}),
    "blocks of 16": Way({"block_tokens": 16}),
    "preemption": Way({"preempt_every": 3}),
    "preemption, depth 3, cache hits": Way({"preempt_every": 4, "depth": 3, "share": True}),
    "no pipeline": Way({"depth": 1, "from_slot": False}),
    "depth 3": Way({"depth": 3}),
    "reference operations": Way(reference=True),
    "two ranks": Way(ranks=2, reference=True),
    "four ranks, chunks, preemption": Way(
        {"chunk": 9, "preempt_every": 5, "share": True}, ranks=4, reference=True
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    windows = {"sliding_window": 10} if request.param == "MistralForCausalLM" else {}
    return Tiny(request.param, config=windows).write(tmp_path_factory.mktemp("tiny"))


@cache
def loaded(folder: Path, reference: bool, kv_dtype: torch.dtype | None) -> tuple[Decoder, OpTable]:
    return load(folder, reference=reference, kv_dtype=kv_dtype)


def make_runner(
    model: Decoder,
    ops: OpTable,
    comm: Comm,
    block_tokens: int,
    device: Device | None = None,
    sizes: GraphSizes = NO_GRAPHS,
    kv_dtype: torch.dtype | None = None,
) -> Runner:
    device = device or CpuDevice(threads=1)
    engine = engine_of(
        model,
        ops,
        device=device,
        comm=comm,
        dtype=torch.float32,
        kv_dtype=kv_dtype,
        graphs=device.graphs,
    )
    wanted = Preparation(
        first_step=0,
        block_tokens=block_tokens,
        slots_max=16,
        state_slots_max=16,
        step_tokens_max=512,
        step_rows_max=16,
    )
    return Runner(engine, wanted, BLOCKS, sizes)


@torch.inference_mode()  # Which is each thread's own.
def execute_plan(runner: Runner, plan: Plan) -> Result:
    return runner.execute(plan)


def tokens_of(folder: Path, way: Way) -> list[list[int]]:
    """Runs every prompt with every sampling; returns what was drawn."""
    requests = [(prompt, kind) for prompt in PROMPTS for kind in SAMPLINGS]
    sequences = [Sequence(prompt, 6 + i % 5, kind) for i, (prompt, kind) in enumerate(requests)]
    batches = [[sequence] for sequence in sequences] if way.alone else [sequences]
    planner = Planner(**({"blocks": BLOCKS} | way.planner))
    comms: list[Any] = group(way.ranks) if way.ranks > 1 else [SingleComm()]
    with ThreadPoolExecutor(way.ranks) as pool:
        if way.ranks > 1:
            ranks = list(
                pool.map(
                    lambda comm: load(folder, comm=comm, reference=True, kv_dtype=way.kv_dtype),
                    comms,
                )
            )
        else:
            ranks = [loaded(folder, way.reference, way.kv_dtype)]
        for batch in batches:
            runners = [
                make_runner(model, ops, comm, planner.block_tokens, kv_dtype=way.kv_dtype)
                for (model, ops), comm in zip(ranks, comms, strict=True)
            ]

            def execute(plan: Plan, runners: list[Runner] = runners) -> Result:
                results = list(pool.map(lambda runner: execute_plan(runner, plan), runners))
                assert len({result.digest for result in results}) == 1
                return results[0]

            replace(planner).run(execute, batch)
    return [sequence.tokens for sequence in sequences]


@cache
def expected(folder: Path) -> list[list[int]]:
    return tokens_of(folder, Way())


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_same_however_steps_are_made(folder: Path, way: str) -> None:
    assert tokens_of(folder, WAYS[way]) == expected(folder)

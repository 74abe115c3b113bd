"""Recorded decode steps: the tokens are those of the operations, whatever was staged before."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import load
from planner import Planner, Sequence
from test_invariance import make_runner

from headrace.batch import GraphSizes
from headrace.comm import SingleComm
from headrace.graphs import ROWS_MAX, buckets, token_buckets
from headrace.runner import Runner
from headrace.testing.recording import RecordedAttention, RecordingDevice
from headrace.testing.tiny import Tiny
from headrace.wire import Plan, Result, Sampling

PROMPTS = [[5, 9, 40, 33, 7], [77] * 19, [3], [101, 44, 260, 8, 8, 12, 300, 4, 91]]
SIZES = GraphSizes(rows=buckets(16), tokens=(16, 18, 20, 32, 64))
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=7),
    Sampling(repetition_penalty=1.3),
    Sampling(top_n=3),
    Sampling(temperature=0.9, watermark=True, seed=8),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny().write(tmp_path_factory.mktemp("tiny"))


def recording(
    folder: Path, block_tokens: int, sizes: GraphSizes | None = None
) -> tuple[Runner, RecordingDevice]:
    model, ops = load(folder, reference=True)
    ops = replace(ops, paged_attention=RecordedAttention())
    for block in model.blocks:
        block.attention._attend = ops.paged_attention.attend
    device = RecordingDevice()
    with torch.inference_mode():
        made = make_runner(
            *(model, ops, SingleComm(), block_tokens),
            device=device,
            sizes=sizes or SIZES,
        )
        made.capture()
    return made, device


def run(made: Runner, planner: Planner, samplings: list[Sampling]) -> list[Sequence]:
    requests = [(prompt, kind) for prompt in PROMPTS for kind in samplings]
    sequences = [Sequence(prompt, 5 + i % 6, kind) for i, (prompt, kind) in enumerate(requests)]

    @torch.inference_mode()
    def execute(plan: Plan) -> Result:
        return made.execute(plan)

    planner.run(execute, sequences)
    return sequences


@pytest.mark.parametrize("samplings", [SAMPLINGS[:1], SAMPLINGS], ids=["greedy", "mixed"])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"depth": 3}, {"chunk": 7, "share": True}, {"preempt_every": 3}, {"reverse": True}],
    ids=str,
)
def test_tokens_are_those_of_the_operations(
    folder: Path, samplings: list[Sampling], knobs: dict[str, int]
) -> None:
    model, ops = load(folder, reference=True)
    planner = Planner(blocks=256, block_tokens=4, **knobs)
    plain = run(make_runner(model, ops, SingleComm(), 4), planner, samplings)
    made, device = recording(folder, 4)
    graphed = run(made, replace(planner), samplings)
    assert [s.tokens for s in graphed] == [s.tokens for s in plain]
    for one, other in zip(graphed, plain, strict=True):
        np.testing.assert_allclose(
            [logprob for logprob, _ in one.results],
            [logprob for logprob, _ in other.results],
            atol=1e-5,
        )
    assert device.replayed > 5


def test_every_size_has_its_graphs(folder: Path) -> None:
    _, device = recording(folder, 16, GraphSizes(rows=(1, 2, 5)))
    assert device.recorded == 2 * 3
    _, device = recording(folder, 16, GraphSizes(tokens=(8, 16)))
    layers = Tiny().layers
    assert device.recorded == 2 * (layers + 1)


def test_steps_that_no_graph_computes_are_computed_by_operation(folder: Path) -> None:
    made, device = recording(folder, 16, GraphSizes(tokens=(4,)))
    run(made, Planner(blocks=256, running_max=1), SAMPLINGS[:1])
    layers = Tiny().layers
    assert device.replayed % (layers + 1) == 0 and device.replayed > 0


def test_sizes_are_dense_at_the_bottom_and_padding_is_bounded() -> None:
    sizes = buckets(10_000)
    assert sizes[:9] == (1, 2, 3, 4, 5, 6, 7, 8, 10) and sizes[-1] == ROWS_MAX
    assert all(after / before <= 1.25 for before, after in itertools.pairwise(sizes[7:]))
    tokens = token_buckets(10_000)
    assert tokens[0] == 16 and tokens[-1] == 2048
    assert all(after / before <= 1.125 for before, after in itertools.pairwise(tokens))
    assert buckets(3) == (1, 2, 3) and buckets(11)[-1] == 11

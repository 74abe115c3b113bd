"""From serve.json to an engine: what is chosen, what is refused, and ranks that are processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planner import Planner, Sequence
from test_comm import free_address, seen
from test_config import example, shard
from torch import multiprocessing

from headrace.config import Serve
from headrace.engine import Engine, Preparation
from headrace.errors import ConfigError
from headrace.load import describe, load_engine
from headrace.runner import Runner
from headrace.testing.recording import RecordingDevice
from headrace.testing.tiny import Tiny
from headrace.wire import Plan, Result, Sampling

VOCAB = 509
BLOCKS = 96

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, seed=2, top_k=20, top_p=0.9, top_n=3),
    Sampling(temperature=1.2, seed=3, typical_p=0.8),
    Sampling(repetition_penalty=1.3, frequency_penalty=0.2, top_n=2),
    Sampling(temperature=1.0, seed=4, presence_penalty=0.6, min_p=0.02),
    Sampling(tokens_min=6, ending_token=(2, 3), bias_token=(2,), bias=(4.0,)),
]


def serve(folder: Path, ranks: int = 1, address: str = "", **device: Any) -> Serve:
    data = example()
    data["model"]["path"] = str(folder)
    data["device"] |= {"kind": "cpu", "dtype": "float32", "threads": 1} | device
    data["shards"] = [shard(rank) | {"rendezvous": address} for rank in range(ranks)]
    return Serve.parse(data)


def requests() -> list[Sequence]:
    rng = np.random.default_rng(7)
    return [
        Sequence(rng.integers(4, VOCAB, 3 + 7 * i).tolist(), 10, sampling)
        for i, sampling in enumerate(SAMPLINGS)
    ]


def new_runner(engine: Engine) -> Runner:
    wanted = Preparation(
        first_step=0,
        block_tokens=8,
        slots_max=16,
        state_slots_max=16,
        step_tokens_max=512,
        step_rows_max=16,
    )
    return Runner(engine, wanted, BLOCKS)


def planner() -> Planner:
    return Planner(block_tokens=8, blocks=BLOCKS, chunk=16)


@torch.inference_mode()
def tokens(engine: Engine) -> list[list[int]]:
    sequences = requests()
    planner().run(new_runner(engine).execute, sequences)
    return [sequence.tokens for sequence in sequences]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(vocab_size=VOCAB).write(tmp_path_factory.mktemp("llama"))


def rank_main(rank: int, folder: Path, address: str, out: Any) -> None:
    engine = load_engine(serve(folder, 2, address), rank)
    sequences = requests()
    runner = new_runner(engine)

    def execute(plan: Plan) -> Result:
        result = runner.execute(plan)
        return result if rank == 0 else seen(runner, plan, result)

    with torch.inference_mode():
        results = planner().run(execute, sequences)
    engine.comm.close()
    digests = [result.digest for result in results]
    out.put((rank, ([sequence.tokens for sequence in sequences], digests)))


def test_the_cpu_waits_for_nobodys_kernels(folder: Path):
    def wait() -> None:
        raise AssertionError("waited for kernels of a GPU")

    assert load_engine(serve(folder), 0, kernels=wait).device.kind == "cpu"


def test_steps_are_recorded_unless_graphs_are_turned_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("headrace.load.open_device", lambda *_: RecordingDevice())
    assert load_engine(serve(folder), 0).graph_inputs is not None
    assert load_engine(serve(folder, graphs=False), 0).graph_inputs is None


@pytest.mark.timeout(180)
def test_two_processes_draw_what_one_draws(folder: Path):
    alone = tokens(load_engine(serve(folder), 0))
    assert tokens(load_engine(serve(folder, reference_ops=True), 0)) == alone
    context = multiprocessing.get_context("spawn")
    out, address = context.SimpleQueue(), free_address()
    ranks = [
        context.Process(target=rank_main, args=(rank, folder, address, out)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    facts = dict(out.get() for _ in ranks)
    assert facts[0] == facts[1], "tokens and digests of both ranks"
    assert facts[0][0] == alone


def test_heads_that_do_not_divide_are_refused_before_anybody_waits(folder: Path):
    with pytest.raises(ConfigError, match="8 attention heads"):
        load_engine(serve(folder, 3, "127.0.0.1:1"), 1)


@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ({"dtype": "int8"}, "dtype `int8` is unknown; auto, float32"),
        ({"dtype": "float16"}, "float16 is not served on the CPU"),
        ({"kind": "abacus"}, "device `abacus` is unknown"),
    ],
)
def test_what_does_not_exist_is_refused(folder: Path, device: dict[str, str], sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        load_engine(serve(folder, **device), 0)


def test_describe_reads_no_weights(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    facts = describe(serve(tmp_path, 2))
    assert facts["architecture"] == "LlamaForCausalLM" and facts["ranks"] == 2
    assert facts["kv_bytes_per_token"] == 2 * 3 * 1 * 16 * 4, "one of the two KV heads a rank"


def test_dummy_weights_serve(folder: Path):
    data = serve(folder)
    object.__setattr__(data.model, "load_format", "dummy")
    engine = load_engine(data, 0)
    assert engine.weight_bytes > 0
    assert all(len(drawn) == 10 for drawn in tokens(engine))

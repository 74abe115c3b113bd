"""A model divided over ranks computes what it computes whole."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import PROMPT, runner

from headrace.comm import join_group
from headrace.device.cpu import CpuDevice
from headrace.errors import ConfigError
from headrace.models import ARCHITECTURES, read_spec
from headrace.testing.oracle import Oracle
from headrace.testing.paged import PagedSequence
from headrace.testing.threads import ThreadComm, run_ranks
from headrace.testing.tiny import Tiny

PROMPTS = [PROMPT, PROMPT[::-1] * 2, [3, 4]]
TOKENS = 8
# float32 sums in another order; logits are about 1.
TOLERANCE = 1e-4


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ranks_agree_with_one(tmp_path: Path, architecture: str, kv_heads: int) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    config = biases if architecture == "LlamaForCausalLM" else {}
    folder = Tiny(architecture, kv_heads=kv_heads, config=config).write(tmp_path)
    expected = Oracle(folder).logits(PROMPT)
    tokens = runner(folder).greedy(PROMPTS, TOKENS)
    for size in (2, 4):

        def rank(comm: ThreadComm) -> tuple[torch.Tensor, list[list[int]]]:
            # The kernel library has one team of threads a process: not for ranks that are threads.
            paged = runner(folder, comm=comm, reference=True)
            logits = paged.step([(PagedSequence(), PROMPT)], every=True)
            return logits, paged.greedy(PROMPTS, TOKENS)

        results = run_ranks(size, rank)
        for logits, greedy in results:
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
            assert greedy == tokens
            assert torch.equal(logits, results[0][0]), "ranks must agree to the bit"


def gloo_rank(folders: list[Path], rank: int, size: int, port: int, results: Any) -> None:
    """One process of a group: runs every checkpoint with the ops that are selected."""
    torch.set_num_threads(1)
    comm = join_group(CpuDevice(threads=1), rank, size, f"127.0.0.1:{port}", 60)
    results.put([runner(folder, comm=comm).greedy(PROMPTS, TOKENS) for folder in folders])
    comm.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("size", [2, 4])
def test_processes_over_gloo_agree_with_one(tmp_path: Path, size: int) -> None:
    folders = [
        Tiny(architecture, kv_heads=kv_heads, tied=kv_heads == 1).write(
            tmp_path / f"{architecture}-{kv_heads}"
        )
        for architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
        for kv_heads in (8, 2, 1)
    ]
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    ranks = [
        context.Process(target=gloo_rank, args=(folders, rank, size, port, results), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    expected = [runner(folder).greedy(PROMPTS, TOKENS) for folder in folders]
    try:
        for _ in ranks:
            assert results.get(timeout=120) == expected
    finally:
        for process in ranks:
            process.join(20)
            process.kill()


# What SmolLM2-135M divides into: 9 heads and 3 KV heads.
SMOLLM2 = Tiny(heads=9, kv_heads=3, width=72, head_dim=8, layers=2)


def test_three_shards_divide_nine_heads_and_three_kv_heads(tmp_path: Path) -> None:
    folder = SMOLLM2.write(tmp_path)
    tokens = runner(folder).greedy(PROMPTS, TOKENS)

    def rank(comm: ThreadComm) -> list[list[int]]:
        return runner(folder, comm=comm, reference=True).greedy(PROMPTS, TOKENS)

    assert run_ranks(3, rank) == [tokens] * 3


@pytest.mark.parametrize(
    ("tiny", "ranks", "sentence"),
    [
        (SMOLLM2, 2, "9 attention heads cannot be divided evenly over 2 shards"),
        (
            Tiny(heads=12, kv_heads=6),
            4,
            "6 KV heads can neither be divided evenly over 4 shards nor replicated evenly "
            "among them",
        ),
        (
            Tiny(mlp_width=90),
            4,
            "90 columns of the MLP (intermediate_size) cannot be divided evenly over 4 shards",
        ),
    ],
    ids=["heads", "kv heads", "mlp"],
)
def test_what_does_not_divide_is_refused_with_the_numbers(
    tmp_path: Path, tiny: Tiny, ranks: int, sentence: str
) -> None:
    folder = tiny.write(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_spec(folder).local(ranks)
    assert str(caught.value) == sentence
    with pytest.raises(ConfigError):
        run_ranks(ranks, lambda comm: runner(folder, comm=comm, reference=True))


def test_local_sizes_replicate_kv_heads_and_pad_the_vocabulary(tmp_path: Path) -> None:
    local = read_spec(Tiny(kv_heads=2).write(tmp_path)).local(4)
    assert (local.heads, local.kv_heads, local.mlp_width) == (2, 1, 24)
    assert local.vocab_size * 4 == 512

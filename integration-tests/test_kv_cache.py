"""A KV cache of eight bits over the whole server: with hits, preempted, divided, and larger."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stack import FLAGS, Stack

PROMPTS = [f"prompt number {n}, which is long enough to fill some of the cache" for n in range(8)]
# Two sequences of the longest fit, so that eight must give way to each other.
SMALL = (*FLAGS[:-1], "60000")


def greedy(server: Stack, prompt: str, tokens: int = 40) -> list[int]:
    parameters = {"max_new_tokens": tokens, "ignore_eos": True, "details": True}
    answer = server.ok("/generate", {"inputs": prompt, "parameters": parameters})
    return [token["id"] for token in answer["details"]["tokens"]]


@pytest.fixture(scope="module")
def coded(tiny_model: Path) -> Iterator[Stack]:
    flags = ("--model-id", str(tiny_model), "--kv-cache-dtype", "fp8_e4m3fn")
    with Stack(*flags, *FLAGS) as stack:
        yield stack.wait_ready()


def test_it_says_what_it_is_and_holds_four_times_the_tokens(coded: Stack, server: Stack) -> None:
    info = json.loads(coded.get("/info")[1])
    other = json.loads(server.get("/info")[1])
    assert info["kv_cache_dtype"] == "float8_e4m3fn"
    assert info["model_dtype"] == other["kv_cache_dtype"] == "float32"
    assert "kv cache float8_e4m3fn, scales of the checkpoint in 0 of 3 layers" in coded.log
    plain = other["max_batch_total_tokens"]
    assert 3.9 * plain < info["max_batch_total_tokens"] < 4.1 * plain


def test_cached_prompts_give_the_same_tokens(coded: Stack) -> None:
    first = greedy(coded, PROMPTS[0])
    hits = coded.metric("headrace_prefix_hits")
    assert greedy(coded, PROMPTS[0]) == first
    assert coded.metric("headrace_prefix_hits") == hits + 1


def test_two_shards_and_preempted_ones_give_the_same_tokens(coded: Stack, tiny_model: Path) -> None:
    expected = [greedy(coded, prompt) for prompt in PROMPTS]
    flags = ("--model-id", str(tiny_model), "--kv-cache-dtype", "fp8_e4m3fn", "--num-shard", "2")
    with Stack(*flags, *SMALL) as server, ThreadPoolExecutor(len(PROMPTS)) as pool:
        server.wait_ready()
        assert list(pool.map(lambda prompt: greedy(server, prompt), PROMPTS)) == expected
        assert server.metric("headrace_preemptions") > 0

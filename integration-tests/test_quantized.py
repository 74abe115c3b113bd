"""Quantized checkpoints over the whole server: what is served is what the numbers say."""

from pathlib import Path

import pytest

from headrace.testing.oracle import Oracle
from headrace.testing.quantized import write
from stack import FLAGS, Stack

PROMPT = "the quick brown fox jumps over"
TOKENS = 12


def greedy(server: Stack) -> list[int]:
    parameters = {"max_new_tokens": TOKENS, "ignore_eos": True, "details": True}
    answer = server.ok("/generate", {"inputs": PROMPT, "parameters": parameters})
    return [token["id"] for token in answer["details"]["tokens"]]


def prompt_ids(server: Stack) -> list[int]:
    return [token["id"] for token in server.ok("/tokenize", {"inputs": PROMPT})]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("gptq", ()),
        ("awq", ("--quantize", "awq")),
        ("fp8-block", ()),
        ("gptq-ordered", ("--num-shard", "2")),
        ("w8a8", ("--num-shard", "2")),
    ],
)
def test_tokens_are_those_of_the_dequantized_model(
    tmp_path: Path, name: str, flags: tuple[str, ...]
) -> None:
    quantized, plain = write(name, tmp_path)
    with Stack("--model-id", str(quantized), *FLAGS, *flags) as server:
        server.wait_ready()
        expected = Oracle(plain).greedy(prompt_ids(server), TOKENS)
        assert greedy(server) == expected


@pytest.mark.parametrize("asked", ["fp8", "bitsandbytes-nf4"])
def test_on_load_tokens_are_those_of_the_reference_server(tiny_model: Path, asked: str) -> None:
    flags = ("--model-id", str(tiny_model), "--quantize", asked, *FLAGS)
    with Stack(*flags) as server:
        tokens = greedy(server.wait_ready())
    with Stack(*flags, "--reference-ops") as reference:
        assert greedy(reference.wait_ready()) == tokens


def test_a_flag_that_does_not_fit_ends_the_start_with_the_alternatives(tiny_model: Path) -> None:
    with Stack("--model-id", str(tiny_model), "--quantize", "gptq", *FLAGS) as server:
        assert server.process.wait(120) == 1
        assert "--quantize gptq: the checkpoint is not quantized" in server.log
        assert "--quantize fp8, eetq, bitsandbytes" in server.log

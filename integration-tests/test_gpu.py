"""The server on a CUDA device answers like the one on the CPU."""

from pathlib import Path

import pytest
import torch

from headrace.testing.tiny import Tiny
from stack import Stack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
PROMPTS = [
    "one",
    "the quick brown fox",
    "a longer prompt that fills a few blocks of the cache " * 6,
]


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_float32_tokens_are_those_of_the_cpu(
    tmp_path: Path, architecture: str, shards: int
) -> None:
    if torch.cuda.device_count() < shards:
        pytest.skip(f"there are no {shards} CUDA devices")
    model = Tiny(architecture=architecture).write(tmp_path / "model")

    def tokens(device: str, shards: int) -> list[list[int]]:
        flags = ("--model-id", str(model), "--dtype", "float32", "--device", device)
        flags += ("--num-shard", str(shards))
        with Stack(*flags) as stack:
            stack.wait_ready()
            parameters = {"max_new_tokens": 32, "details": True, "ignore_eos": True}
            answers = [
                stack.ok("/generate", {"inputs": prompt, "parameters": parameters})
                for prompt in PROMPTS
            ]
            assert f'"model_device_type":"{device}"' in stack.get("/info")[1]
        return [[t["id"] for t in answer["details"]["tokens"]] for answer in answers]

    assert tokens("cuda", shards) == tokens("cpu", 1)

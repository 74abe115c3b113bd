"""The server on CUDA devices answers like the one on the CPU, and ends as it does."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from headrace.testing.tiny import Tiny
from stack import Stack, alive
from test_faults import LONG, command_line, wait_until

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


def test_a_dead_rank_ends_the_server_although_others_wait_for_it(tmp_path: Path) -> None:
    """The kernels of the rank that lives wait for sums that nobody will send."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there are no two CUDA devices")
    model = Tiny().write(tmp_path / "model")
    flags = ("--model-id", str(model), "--device", "cuda", "--num-shard", "2")
    with Stack(*flags) as stack:
        stack.wait_ready()

        def ask() -> None:
            with contextlib.suppress(OSError):  # The server ends meanwhile.
                stack.post("/generate", LONG)

        threading.Thread(target=ask, daemon=True).start()
        wait_until(lambda: stack.metric("tgi_batch_current_size") >= 1)
        children = stack.children()
        shards = [pid for pid in children if "shard" in command_line(pid)]
        assert len(shards) == 2
        os.kill(shards[1], signal.SIGKILL)
        assert stack.wait_exit() == 1
        assert "ShardFailed" in stack.log
        assert not any(alive(pid) for pid in children)

"""Whole models on a GPU, graphs and all: the CPU's tokens, transformers' tokens, flat memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planner import Planner, Sequence
from test_invariance import PROMPTS, SAMPLINGS
from test_smollm2 import PROMPTS as TEXTS
from test_smollm2 import cached

from headrace.batch import NO_GRAPHS
from headrace.device import open_device
from headrace.engine import Preparation
from headrace.models import ARCHITECTURES
from headrace.ops.triton import warn_of_kernels
from headrace.prepare import graph_sizes, prepare_engine
from headrace.runner import Runner
from headrace.testing import engine
from headrace.testing.tiny import Tiny
from headrace.wire import Plan, Result

pytestmark = pytest.mark.gpu
WANTED = Preparation(
    first_step=0,
    block_tokens=16,
    slots_max=64,
    state_slots_max=64,
    step_tokens_max=2048,
    step_rows_max=64,
    prompt_logprob_tokens_max=512,
)
BLOCKS = 1024
WAYS: dict[str, dict[str, Any]] = {
    "one batch": {},
    "chunks": {"chunk": 7},
    "cache hits in chunks": {"share": True, "chunk": 5},
    "preemption, depth 3, cache hits": {"preempt_every": 4, "depth": 3, "share": True},
    "no pipeline": {"depth": 1, "from_slot": False},
    "another order": {"reverse": True},
}
# Rows and their prompts' lengths, together fewer tokens than a step tells of, and than the largest
# step in pieces.
LENGTHS = list(enumerate((1, 17, 64, 130, 200)))
# How much farther from float32's logits than transformers' bfloat16 ours may be.
FARTHER = 1.5


@torch.inference_mode()
def made(folder: Path, device: str, dtype: torch.dtype, **changes: Any) -> Runner:
    loaded = engine.load(folder, open_device(device), dtype=dtype)
    return engine.runner(loaded, replace(WANTED, **changes), BLOCKS)


def drawn(runner: Runner, requests: list[Sequence], **knobs: Any) -> list[list[int]]:
    @torch.inference_mode()
    def execute(plan: Plan) -> Result:
        return runner.execute(plan)

    Planner(blocks=BLOCKS, block_tokens=16, running_max=32, **knobs).run(execute, requests)
    return [request.tokens for request in requests]


def start_again(runner: Runner) -> None:
    """For a planner that counts from 0 and finds every slot free."""
    runner._next_step = 0
    runner.slots.bound_Z[:] = False


def requests() -> list[Sequence]:
    cases = [(prompt, kind) for prompt in PROMPTS for kind in SAMPLINGS]
    return [Sequence(prompt, 6 + i % 9, kind) for i, (prompt, kind) in enumerate(cases)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_tokens_are_the_cpus(tmp_path: Path, architecture: str) -> None:
    windows = {"sliding_window": 10} if architecture == "MistralForCausalLM" else {}
    folder = Tiny(architecture, config=windows).write(tmp_path)
    expected = drawn(made(folder, "cpu", torch.float32), requests())
    for name, knobs in WAYS.items():
        runner = made(folder, "cuda", torch.float32)
        assert drawn(runner, requests(), **knobs) == expected, name


@pytest.fixture(scope="module")
def smollm2() -> Path:
    found = cached()
    if found is None:
        pytest.skip("SmolLM2-135M is not on this machine")
    return found


def their_model(folder: Path, dtype: torch.dtype) -> Any:
    """Transformers' model on this GPU."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()


@pytest.fixture(scope="module")
@torch.inference_mode()
def theirs(smollm2: Path) -> tuple[list[list[int]], list[list[int]], Any]:
    """Prompts, transformers' greedy tokens of them in float32 on this GPU, and its model."""
    model = their_model(smollm2, torch.float32)
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        output = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)
        tokens.append(output[0, len(prompt) :].tolist())
    return prompts, tokens, model


def test_float32_tokens_are_those_of_transformers(smollm2: Path, theirs: Any) -> None:
    prompts, expected, _ = theirs
    ours = [Sequence(prompt, 32) for prompt in prompts]
    assert drawn(made(smollm2, "cuda", torch.float32), ours) == expected


@torch.inference_mode()
def test_bfloat16_logprobs_are_as_near_to_float32_as_those_of_transformers(
    smollm2: Path, theirs: Any
) -> None:
    prompts, tokens, exact = theirs
    half = their_model(smollm2, torch.bfloat16)
    runner = made(smollm2, "cuda", torch.bfloat16)
    whole = [prompt + answer for prompt, answer in zip(prompts, tokens, strict=True)]
    ours = [Sequence(known, 1, prompt_logprobs=True) for known in whole]
    told: dict[int, list[float]] = {}

    def execute(plan: Plan) -> Result:
        result = runner.execute(plan)
        at = 0
        for row, length in enumerate(plan.row_len_S.tolist()):
            slot = int(plan.row_slot_S[row])
            told.setdefault(slot, []).extend(result.prompt_logprob[at : at + length].tolist())
            at += length
        return result

    errors: list[list[np.ndarray]] = [[], []]
    for one, known in zip(ours, whole, strict=True):
        told.clear()
        start_again(runner)
        Planner(blocks=BLOCKS, block_tokens=16).run(execute, [one])
        (mine,) = (np.array(values[1 : len(known)]) for values in told.values())
        reference = logprobs(exact, known)
        errors[0].append(np.abs(mine - reference))
        errors[1].append(np.abs(logprobs(half, known) - reference))
    mine, his = (np.concatenate(found) for found in errors)
    assert mine.mean() <= FARTHER * his.mean(), (mine.mean(), his.mean())
    assert mine.max() <= 2 * FARTHER * his.max(), (mine.max(), his.max())


def logprobs(model: Any, known: list[int]) -> np.ndarray:
    """The log-probability of each token but the first, given those before it."""
    ids = torch.tensor(known, device="cuda")
    logits_TV = model(ids[None]).logits[0].float().log_softmax(-1)
    return logits_TV[:-1].gather(1, ids[1:, None])[:, 0].cpu().numpy()


@pytest.mark.parametrize("chunk", [1 << 20, 37], ids=["whole prompts", "chunks"])
def test_bfloat16_steps_in_pieces_are_the_operations(tmp_path: Path, chunk: int) -> None:
    folder = Tiny(width=256, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16).write(tmp_path)
    prompts = [[(7 * i + 3 * row) % 500 for i in range(length)] for row, length in LENGTHS]

    @torch.inference_mode()
    def told(graphs: bool) -> np.ndarray:
        loaded = engine.load(folder, open_device("cuda"))
        sizes = graph_sizes(loaded, WANTED) if graphs else NO_GRAPHS
        runner = Runner(loaded, WANTED, BLOCKS, sizes)
        runner.capture()
        asked = [Sequence(prompt, 1, prompt_logprobs=True) for prompt in prompts]
        found: list[np.ndarray] = []

        def execute(plan: Plan) -> Result:
            result = runner.execute(plan)
            found.append(np.nan_to_num(result.prompt_logprob))
            return result

        Planner(blocks=BLOCKS, block_tokens=16, running_max=32, chunk=chunk).run(execute, asked)
        return np.concatenate(found)

    np.testing.assert_allclose(told(graphs=True), told(graphs=False), atol=0.15)


@torch.inference_mode()
def test_nothing_is_allocated_or_compiled_after_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Tiny(width=256, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16).write(tmp_path)
    loaded = engine.load(folder, open_device("cuda"))
    ready, _ = prepare_engine(loaded, replace(WANTED, blocks_max=BLOCKS))
    warn_of_kernels()
    torch.cuda.synchronize()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    for knobs in WAYS.values():
        drawn(ready, requests(), **knobs)
        start_again(ready)
    prompts = [[(7 * i + 3 * row) % 500 for i in range(length)] for row, length in LENGTHS]
    drawn(ready, [Sequence(prompt, 3, prompt_logprobs=True) for prompt in prompts])
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == reserved
    assert torch.cuda.mem_get_info()[0] >= free
    assert [r.message for r in caplog.records if "a step waited" in r.message] == []

"""Every architecture against transformers and against the oracle, on tiny random checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import PROMPT, runner
from torch import Tensor

from headrace.models import ARCHITECTURES
from headrace.testing.oracle import Oracle
from headrace.testing.paged import PagedSequence
from headrace.testing.tiny import Tiny

# Both sides compute in float32, in another order; logits are about 1.
TOLERANCE = 1e-4


def parity(folder: Path, prompt: list[int], reference: bool) -> None:
    """Prefills all but five tokens in two chunks, decodes the rest, and compares every logit."""
    paged = runner(folder, reference=reference)
    sequence = PagedSequence()
    chunks = [prompt[:7], prompt[7:-5], *([token] for token in prompt[-5:])]
    logits_TV = torch.cat([paged.step([(sequence, chunk)], every=True) for chunk in chunks])
    assert logits_TV.dtype == torch.float32
    assert_near(logits_TV, Oracle(folder).logits(prompt))
    assert_near(logits_TV, transformers_logits(folder, prompt))


def transformers_logits(folder: Path, prompt: list[int]) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("reference", [False, True], ids=["selected", "reference"])
@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(
    tmp_path: Path, architecture: str, spelling: int, reference: bool
) -> None:
    folder = Tiny(architecture, spelling=spelling, tied=spelling == 4).write(tmp_path)
    parity(folder, PROMPT, reference)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 biases": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "mistral window": ("MistralForCausalLM", {"sliding_window": 6}),
    "qwen2 window on late layers": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3 window by layer types": (
        "Qwen3ForCausalLM",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "llama without head_dim": ("LlamaForCausalLM", {"head_dim": None}),
}


@pytest.mark.parametrize("reference", [False, True], ids=["selected", "reference"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_those_of_transformers(tmp_path: Path, variant: str, reference: bool) -> None:
    architecture, config = VARIANTS[variant]
    tiny = Tiny(architecture, config=config)
    if "head_dim" in config:
        tiny = replace(tiny, head_dim=tiny.width // tiny.heads)
    parity(tiny.write(tmp_path), PROMPT, reference)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize(
    ("kind", "values"), [("linear", {"factor": 3.0}), ("llama3", LLAMA3), ("yarn", YARN)]
)
def test_rope_scalings_are_those_of_transformers(
    tmp_path: Path, kind: str, values: dict[str, Any], spelling: int
) -> None:
    if spelling == 5:
        parameters = {"rope_theta": 5000.0, "rope_type": kind, **values}
        config: dict[str, Any] = {"rope_parameters": parameters}
    else:
        config = {"rope_theta": 5000.0, "rope_scaling": {"rope_type": kind, **values}}
    folder = Tiny(spelling=spelling, config=config).write(tmp_path)
    parity(folder, PROMPT * 8, reference=True)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    folder = Tiny(dtype=torch.bfloat16).write(tmp_path)
    expected = Oracle(folder).logits(PROMPT)
    actual = runner(folder, dtype=torch.bfloat16).step([(PagedSequence(), PROMPT)], every=True)
    assert actual.dtype == torch.float32
    # Eight bits of mantissa, through three layers, on logits of about 1.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.15)


def test_only_sampled_tokens_get_logits(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    every = runner(folder).step([(PagedSequence(), PROMPT)], every=True)
    last = runner(folder).step([(PagedSequence(), PROMPT)])
    assert every.shape == (len(PROMPT), 509)
    assert last.shape == (1, 509)
    assert_near(last[0], every[-1])


PROMPTS = [PROMPT, PROMPT[::-1], [3], PROMPT * 3, [400, 401]]


@pytest.mark.parametrize("reference", [False, True], ids=["selected", "reference"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_do_not_depend_on_how_a_prompt_is_run(
    tmp_path: Path, architecture: str, reference: bool
) -> None:
    config = {"sliding_window": 9} if architecture == "MistralForCausalLM" else {}
    folder = Tiny(architecture, config=config).write(tmp_path)
    oracle = Oracle(folder)
    expected = [oracle.greedy(prompt, 12) for prompt in PROMPTS]
    paged = runner(folder, reference=reference)
    assert paged.greedy(PROMPTS, 12) == expected
    assert [paged.greedy([prompt], 12)[0] for prompt in PROMPTS] == expected
    small = runner(folder, reference=reference, block_tokens=4)
    assert small.greedy(PROMPTS[:3], 12) == expected[:3]
    for chunk in (1, 5):
        assert chunked(paged, PROMPTS[3], chunk, 12) == expected[3]


def chunked(paged: Any, prompt: list[int], chunk: int, tokens: int) -> list[int]:
    """Greedy tokens of a prompt that is prefilled in chunks."""
    sequence = PagedSequence()
    for at in range(0, len(prompt), chunk):
        logits_SV = paged.step([(sequence, prompt[at : at + chunk])])
    output = [int(logits_SV.argmax())]
    while len(output) < tokens:
        output.append(int(paged.step([(sequence, output[-1:])]).argmax()))
    return output


def test_a_row_reads_what_another_row_of_its_step_writes(tmp_path: Path) -> None:
    paged = runner(Tiny().write(tmp_path))
    first, twin = PagedSequence(), PagedSequence()
    expected = paged.step([(first, PROMPT[:18])])
    # The twin leases the first's full block before either has been computed.
    first = PagedSequence()
    paged.step([(first, PROMPT[:1])])
    first.length = 0
    twin.blocks, twin.length = first.blocks[:1], 16
    logits_SV = paged.step([(first, PROMPT[:17]), (twin, PROMPT[16:18])])
    assert_near(logits_SV[1], expected[0])

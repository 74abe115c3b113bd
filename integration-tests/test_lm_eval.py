"""lm-eval as it is installed, on the default model: its figures are those that PyTorch computes.

`tools/test_clients.sh lm-eval` makes the environment and runs this; it is no part of `make test`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.hub import HubError, resolve
from headrace.hub.default_model import DEFAULT_MODEL_ID
from programs import run
from stack import Stack

# lm-eval takes most of a minute to start.
pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]
SECONDS_MAX = 800.0

DOCUMENTS = [
    {"text": "The capital of France is", "right": " Paris", "wrong": " London"},
    {"text": "The capital of Italy is", "right": " Rome", "wrong": " Madrid"},
    {"text": "The capital of Japan is", "right": " Tokyo", "wrong": " Buenos Aires"},
    {"text": "Water freezes at zero degrees", "right": " Celsius", "wrong": " banana"},
]
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}{{right}}.",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{right}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


class Reference:
    """The model in PyTorch."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def loglikelihood(self, before: list[int], after: list[int]) -> float:
        ids = before + after
        with self.torch.inference_mode():
            logprobs = self.model(self.torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(before), len(ids))
        return sum(logprobs[at - 1, ids[at]].item() for at in places)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return resolve(DEFAULT_MODEL_ID).path
    except HubError as error:
        pytest.skip(f"the default model is not to be had here: {error}")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Stack]:
    flags = ("--dtype", "float32", "--kv-memory", "256MiB")
    with Stack("--model-id", str(folder), *flags) as stack:
        yield stack.wait_ready()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    documents = path / "documents.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
    }
    for name, task in TASKS.items():
        # JSON is YAML.
        (path / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))
    return path


@pytest.mark.parametrize("options", ["tokenized_requests=False", "num_concurrent=2"])
def test_figures_are_those_of_pytorch(
    served: Stack, folder: Path, reference: Reference, tasks: Path, options: str, tmp_path: Path
) -> None:
    """As texts and, by default, as token ids."""
    url = f"http://127.0.0.1:{served.port}/v1/completions"
    output = run(
        *("lmeval", "lm_eval", "--model", "local-completions"),
        *("--model_args", f"model=tgi,base_url={url},tokenizer={folder},{options}"),
        *("--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", "4"),
        *("--output_path", str(tmp_path), "--log_samples"),
        seconds_max=SECONDS_MAX,
    )
    (results,) = tmp_path.rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]
    assert figures["choice"]["acc,none"] == 1.0, output
    assert figures["writing"]["exact_match,none"] == 1.0, output

    def answers(task: str) -> list[Any]:
        (samples,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        ordered = sorted(lines, key=lambda line: line["doc_id"])
        return [line["filtered_resps"] for line in ordered]

    ids = reference.ids
    for document, told in zip(DOCUMENTS, answers("choice"), strict=True):
        text = document["text"]
        for (figure, greedy), choice in zip(told, ("right", "wrong"), strict=True):
            after = ids(text + document[choice])[len(ids(text)) :]
            expected = reference.loglikelihood(ids(text), after)
            assert float(figure) == pytest.approx(expected, abs=1e-3)
            assert greedy == str(choice == "right")
    # Before the first token lm-eval puts the one that begins a text.
    start = [reference.tokenizer.bos_token_id]
    for document, (figure,) in zip(DOCUMENTS, answers("rolling"), strict=True):
        expected = reference.loglikelihood(start, ids(f"{document['text']}{document['right']}."))
        assert float(figure) == pytest.approx(expected, abs=1e-2)

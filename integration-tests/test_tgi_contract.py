"""A server started as TGI's own tests start one: by that name, with those flags and variables."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import stack as stacks
from headrace.testing.tiny import Tiny
from stack import Stack, free_port

# What the tests of TGI set.
VARIABLES = {"LOG_LEVEL": "info,text_generation_router=debug", "PREFILL_CHUNKING": "1"}
FLAGS = (
    *("--num-shard", "1", "--dtype", "float32", "--cuda-graphs", "1,2", "--trust-remote-code"),
    *("--max-input-length", "200", "--max-batch-prefill-tokens", "300"),
    *("--max-total-tokens", "256"),
)
ENOUGH_FOR_A_TEST = ("--device", "cpu", "--threads", "1", "--kv-memory", "16000000")
FIRST = "<|endoftext|>"


def write_model(folder: Path) -> Path:
    """A tiny model whose tokenizer puts a special token before every text, as Llama's does."""
    Tiny(config={"max_position_embeddings": 512}).write(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": FIRST, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {FIRST: {"id": FIRST, "ids": [0], "tokens": [FIRST]}},
    }
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("contract")
    launcher = folder / "text-generation-launcher"
    launcher.symlink_to(stacks.HEADRACE)
    model = write_model(folder / "model")
    with pytest.MonkeyPatch.context() as patch, socket.socket() as busy:
        patch.setattr(stacks, "HEADRACE", launcher)
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        own = ("--model-id", str(model), "--shard-uds-path", str(folder / "uds"))
        ports = ("--master-port", str(free_port()))
        ports += ("--prometheus-port", str(busy.getsockname()[1]))
        with Stack(*own, *ports, *FLAGS, *ENOUGH_FOR_A_TEST, **VARIABLES) as stack:
            yield stack.wait_ready()


def test_the_flags_and_variables_of_tgi_s_tests_start_a_server(launched: Stack) -> None:
    answer = launched.ok("/generate", {"inputs": "test", "parameters": {"max_new_tokens": 3}})
    assert answer["generated_text"]
    info = json.loads(launched.get("/info")[1])
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (200, 256)


def test_the_log_says_connected_when_requests_are_served(launched: Stack) -> None:
    assert "Connected" in launched.log


def test_metrics_are_on_the_main_port_whoever_has_the_other(launched: Stack) -> None:
    assert launched.get("/metrics")[0] == 200


def test_a_chat_gets_no_special_tokens_beside_those_of_its_template(launched: Stack) -> None:
    assert launched.ok("/tokenize", {"inputs": "hi"})[0]["id"] == 0
    messages = [{"role": "user", "content": "hi"}]
    told = launched.ok("/chat_tokenize", {"messages": messages})["tokenize_response"]
    assert [token["id"] for token in told].count(0) == 0
    answer = launched.ok("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens"] == len(told)


def test_sigterm_ends_it_within_a_minute(launched: Stack) -> None:
    launched.process.send_signal(signal.SIGTERM)
    assert launched.wait_exit(60) == 0

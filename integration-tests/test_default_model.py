"""What a stranger sees first: the server without a flag, on a real model."""

from collections.abc import Iterator

import pytest

from headrace.hub import HubError, resolve
from headrace.hub.default_model import DEFAULT_MODEL_ID
from stack import Stack


@pytest.fixture(scope="module")
def default_server() -> Iterator[Stack]:
    try:
        resolve(DEFAULT_MODEL_ID)
    except HubError as error:
        pytest.skip(f"the default model is not to be had here: {error}")
    with Stack("--kv-memory", "256MiB") as stack:
        yield stack.wait_ready()


def test_banner_shows_the_address_and_a_line_to_try(default_server: Stack) -> None:
    assert f"http://127.0.0.1:{default_server.port}" in default_server.log
    assert "curl -N" in default_server.log


def test_real_model_knows_a_capital(default_server: Stack) -> None:
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 3}}
    assert "Paris" in default_server.ok("/generate", body)["generated_text"]


def test_chat_streams_words(default_server: Stack) -> None:
    question = [{"role": "user", "content": "What is gravity? Answer in one sentence."}]
    body = {"messages": question, "max_tokens": 48, "temperature": 0, "stream": True}
    *chunks, done = default_server.stream("/v1/chat/completions", body)
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert done == "[DONE]"
    assert "ravity" in text
    assert len(chunks) > 8

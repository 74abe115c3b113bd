"""What a stranger sees first: the server without a flag, on a real model."""

import json
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


def shot(a: int, b: int) -> list[dict[str, str]]:
    call = json.dumps({"name": "add", "parameters": {"a": a, "b": b}})
    return [
        {"role": "user", "content": f"Add {a} and {b}"},
        {"role": "assistant", "content": call},
    ]


def test_real_model_calls_a_tool_when_shown_how(default_server: Stack) -> None:
    """Too small to do it by itself. Its template shows no tools, so the last message does."""
    question = {"role": "user", "content": "Add 7 and 8"}
    body = {
        "messages": [*shot(1, 2), *shot(3, 4), *shot(5, 6), question],
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "tool_prompt": "Answer like before.",
        "max_tokens": 64,
        "temperature": 0,
    }
    choice = default_server.ok("/v1/chat/completions", body)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"]) == {"a": 7, "b": 8}
    *chunks, done = default_server.stream("/v1/chat/completions", body | {"stream": True})
    parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", [])]
    assert parts[0]["function"] == {"name": "add", "arguments": ""}
    streamed = "".join(part["function"]["arguments"] for part in parts)
    assert (streamed, done) == (call["function"]["arguments"], "[DONE]")
    # A next turn has the call and its result, under the id that was given.
    answer = choice["message"] | {"content": None}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "15"}
    turn = body | {"messages": [question, answer, result]}
    prompt = default_server.ok("/chat_tokenize", turn)["templated_text"]
    assert '{"name": "add", "parameters": {"a": 7, "b": 8}}<|im_end|>' in prompt
    assert "tool\n15" in prompt


def test_chat_streams_words(default_server: Stack) -> None:
    question = [{"role": "user", "content": "What is gravity? Answer in one sentence."}]
    body = {"messages": question, "max_tokens": 48, "temperature": 0, "stream": True}
    *chunks, done = default_server.stream("/v1/chat/completions", body)
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert done == "[DONE]"
    assert "ravity" in text
    assert len(chunks) > 8


def test_a_prompt_is_told_of_in_several_steps(default_server: Stack) -> None:
    """A step tells of at most 512 tokens: what later steps tell goes on where it ended."""
    text = " ".join(f"The {n}th river runs north." for n in range(180))
    ids = [token["id"] for token in default_server.ok("/tokenize", {"inputs": text})]
    assert len(ids) > 2 * 512
    body = {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}

    def scores(prompt: list[int]) -> list[float]:
        choice = default_server.ok("/v1/completions", body | {"prompt": [prompt]})["choices"][0]
        return choice["logprobs"]["token_logprobs"]

    whole = scores(ids)
    assert len(whole) == len(ids) and whole[0] is None and None not in whole[1:]
    # The first step's tokens, and those of a later step's beginning by other steps.
    for length in (400, 700):
        assert whole[1:length] == pytest.approx(scores(ids[:length])[1:], abs=1e-3)

"""OpenAI's routes over the whole server."""

import pytest

from stack import Stack

MESSAGES = [{"role": "user", "content": "what is a river?"}]


def test_chat_answers_with_usage(server: Stack) -> None:
    body = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    answer = server.ok("/v1/chat/completions", body)
    assert answer["object"] == "chat.completion"
    assert answer["id"]
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 9
    assert usage["total_tokens"] == usage["prompt_tokens"] + 9


def test_chat_stream_says_the_same_and_ends_with_done(server: Stack) -> None:
    body = {"messages": MESSAGES, "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    whole = server.ok("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = server.stream("/v1/chat/completions", body)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 9
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_string_is_cut_and_never_streamed(server: Stack) -> None:
    body = {"prompt": "the river", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    text = server.ok("/v1/completions", body)["choices"][0]["text"]
    stop = text[4:7]
    cut = text[: text.index(stop)]
    answer = server.ok("/v1/completions", body | {"stop": stop})
    assert answer["choices"][0]["text"] == cut
    streamed = ""
    for event in server.stream("/v1/completions", body | {"stop": [stop], "stream": True}):
        if event != "[DONE]" and event["choices"]:
            streamed += event["choices"][0]["text"]
    assert streamed == cut


def test_several_prompts_answer_by_index(server: Stack) -> None:
    body = {"prompt": ["one", "two"], "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    choices = server.ok("/v1/completions", body)["choices"]
    assert [c["index"] for c in choices] == [0, 1]


def test_models_lists_the_served_one(server: Stack) -> None:
    status, text = server.get("/v1/models")
    assert status == 200
    assert '"object":"list"' in text


def test_an_echoed_prompt_is_scored_as_it_was_drawn(server: Stack) -> None:
    """As lm-eval scores: what the model drew greedily is the most probable in each place."""
    inputs = "the quick brown fox"
    parameters = {"max_new_tokens": 12, "ignore_eos": True, "decoder_input_details": True}
    details = server.ok("/generate", {"inputs": inputs, "parameters": parameters})["details"]
    prompt = [token["id"] for token in details["prefill"]]
    drawn = [token["id"] for token in details["tokens"]]
    body = {"prompt": [prompt + drawn], "echo": True, "logprobs": 1, "max_tokens": 0}
    answer = server.ok("/v1/completions", body | {"temperature": 0})
    told = answer["choices"][0]["logprobs"]
    scores, tops = told["token_logprobs"], told["top_logprobs"]
    assert len(scores) == len(tops) == len(prompt) + len(drawn)
    assert scores[0] is None and tops[0] is None
    before = [token["logprob"] for token in details["prefill"]]
    assert scores[1 : len(prompt)] == pytest.approx(before[1:], abs=1e-3)
    for score, top in zip(scores[len(prompt) :], tops[len(prompt) :], strict=True):
        assert score == max(top.values())
    for score, top in zip(scores[1:], tops[1:], strict=True):
        assert score <= max(top.values())
    assert answer["usage"]["completion_tokens"] == 0

"""OpenAI's routes over the whole server."""

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

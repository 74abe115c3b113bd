"""OpenAI's SDK against a server: `client_openai.py URL`."""

import sys

import openai
from openai import OpenAI
from promises import MESSAGES, PROMPT, kept, refused

# `ignore_eos` makes the length certain; it is no field of OpenAI's.
CHAT = {
    "model": "tgi",
    "messages": MESSAGES,
    "max_tokens": 8,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}
TEXT = {
    "model": "tgi",
    "prompt": PROMPT,
    "max_tokens": 8,
    "temperature": 0,
    "extra_body": {"ignore_eos": True},
}


def models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert len(listed) == 1
    assert client.models.retrieve(listed[0].id).id == listed[0].id
    refused(openai.NotFoundError, lambda: client.models.retrieve("nobody/nothing"))


def chat(client: OpenAI) -> str:
    answer = client.chat.completions.create(**CHAT)
    choice, usage = answer.choices[0], answer.usage
    assert answer.object == "chat.completion"
    assert answer.id
    assert choice.finish_reason == "length"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert usage is not None
    assert usage.completion_tokens == 8
    assert usage.total_tokens == usage.prompt_tokens + 8
    return choice.message.content


def chat_stream(client: OpenAI, whole: str) -> None:
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=options))
    *chunks, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 8


def chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 8
    for token in logprobs.content:
        # Greedy: what was drawn is the most probable alternative.
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob
        assert token.top_logprobs[0].token == token.token


def chat_stop(client: OpenAI, whole: str) -> None:
    """The answer ends before the stop string, streamed or not."""
    stop = whole[3:5]
    cut = whole[: whole.index(stop)]
    answer = client.chat.completions.create(**CHAT, stop=stop)
    assert answer.choices[0].message.content == cut
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**CHAT, stop=[stop], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut


def chat_several(client: OpenAI) -> None:
    ask = CHAT | {"temperature": 1.5, "n": 2, "seed": 5}
    answers = [client.chat.completions.create(**ask) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 2
    assert texts[0][0] != texts[0][1]


def chat_leaves_early(client: OpenAI) -> None:
    """A client may close a stream before its end."""
    with client.chat.completions.create(**CHAT | {"max_tokens": 40}, stream=True) as stream:
        next(iter(stream))


def chat_bias(client: OpenAI) -> None:
    """A bias of 100 makes a token certain."""
    ask = CHAT | {"logit_bias": {"68": 100}}
    content = client.chat.completions.create(**ask).choices[0].message.content
    assert content
    assert len(set(content)) == 1


def completions(client: OpenAI) -> str:
    answer = client.completions.create(**TEXT)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    several = client.completions.create(**TEXT | {"prompt": [PROMPT, "another"]})
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == answer.choices[0].text
    return answer.choices[0].text


def completions_stream(client: OpenAI, whole: str) -> None:
    chunks = list(client.completions.create(**TEXT, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def completions_logprobs(client: OpenAI) -> None:
    logprobs = client.completions.create(**TEXT, logprobs=2).choices[0].logprobs
    assert logprobs is not None
    columns = (
        logprobs.tokens,
        logprobs.token_logprobs,
        logprobs.top_logprobs,
        logprobs.text_offset,
    )
    assert all(column is not None and len(column) == 8 for column in columns)


def errors(client: OpenAI) -> None:
    """Refusals arrive as the SDK's classes, those of streams too; the body names the field.

    The body is TGI's: a sentence where OpenAI has an object, so `str(error)` is the status alone.
    """
    create, complete = client.chat.completions.create, client.completions.create
    calls = [
        ("temperature", lambda: create(**CHAT | {"temperature": -1})),
        ("top_p", lambda: create(**CHAT, top_p=7, stream=True)),
        ("max_tokens", lambda: create(**CHAT | {"max_tokens": 0})),
        ("messages", lambda: create(**CHAT | {"messages": []})),
        ("top_logprobs", lambda: create(**CHAT, logprobs=True, top_logprobs=20)),
        ("tokens", lambda: complete(**TEXT | {"prompt": "word " * 500})),
        ("prompt", lambda: complete(**TEXT | {"prompt": ["x"] * 9})),
        ("suffix", lambda: complete(**TEXT, suffix="x")),
    ]
    for names, call in calls:
        error = refused(openai.UnprocessableEntityError, call)
        assert names in str(error.body), (names, error.body)
        assert error.status_code == 422
    long = TEXT | {"prompt": "x" * 3_000_000}
    error = refused(openai.APIStatusError, lambda: complete(**long))
    assert error.status_code == 413


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    kept(models, client)
    whole = kept(chat, client)
    kept(chat_stream, client, whole)
    kept(chat_logprobs, client)
    kept(chat_stop, client, whole)
    kept(chat_several, client)
    kept(chat_leaves_early, client)
    kept(chat_bias, client)
    text = kept(completions, client)
    kept(completions_stream, client, text)
    kept(completions_logprobs, client)
    kept(errors, client)


if __name__ == "__main__":
    main(sys.argv[1])

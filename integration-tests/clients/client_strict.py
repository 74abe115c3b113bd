"""Every answer of `/v1` is of the types of OpenAI's SDK, strictly: `client_strict.py URL`.

Two things are TGI's or have no type: `finish_reason` in the streams of completions, which is TGI's
word, and empty before the end; and the first token of a prompt, whose log-probability is null, as
it is in OpenAI's own answers.
"""

import sys
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from promises import MESSAGES, PROMPT, kept
from strict import events, parse, whole

SHORT = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "tgi", "messages": MESSAGES} | SHORT
TEXT = {"model": "tgi", "prompt": PROMPT} | SHORT
USAGE = {"stream_options": {"include_usage": True}}
# TGI's words for OpenAI's.
WORDS = {"": "", "eos_token": "stop", "stop_sequence": "stop", "length": "length"}


def models(url: str) -> None:
    listed = whole(f"{url}/models")
    assert set(listed) == {"object", "data"}
    assert listed["object"] == "list"
    for model in listed["data"]:
        one = parse(Model, model)
        assert parse(Model, whole(f"{url}/models/{one.id}")) == one


def chat(url: str) -> str:
    text = ""
    for more in ({}, {"logprobs": True, "top_logprobs": 2}, {"n": 2, "temperature": 1}):
        answer = parse(ChatCompletion, whole(f"{url}/chat/completions", CHAT | more))
        assert answer.usage is not None
        assert (answer.choices[0].logprobs is not None) == ("logprobs" in more)
        text = text or answer.choices[0].message.content or ""
    return text


def chat_stream(url: str) -> None:
    for more in ({}, USAGE, {"logprobs": True, "top_logprobs": 2} | USAGE, {"n": 2}):
        parts = [
            parse(ChatCompletionChunk, part)
            for part in events(f"{url}/chat/completions", CHAT | more)
        ]
        assert (parts[-1].usage is not None) == ("stream_options" in more)
        reasons = [choice.finish_reason for part in parts for choice in part.choices]
        assert reasons.count("length") == more.get("n", 1)


def stopped(url: str, text: str) -> None:
    """A stop string ends an answer with OpenAI's word."""
    ask = CHAT | {"stop": text[2:4]}
    answer = parse(ChatCompletion, whole(f"{url}/chat/completions", ask))
    assert answer.choices[0].finish_reason == "stop"
    *_, last = events(f"{url}/chat/completions", ask)
    assert parse(ChatCompletionChunk, last).choices[0].finish_reason == "stop"
    answer = parse(Completion, whole(f"{url}/completions", TEXT))
    ask = TEXT | {"stop": answer.choices[0].text[2:4]}
    answer = parse(Completion, whole(f"{url}/completions", ask))
    assert answer.choices[0].finish_reason == "stop"


def completions(url: str) -> None:
    several = {"prompt": [PROMPT, "a"], "n": 2, "best_of": 2}
    for more in ({}, {"logprobs": 2}, several):
        answer = parse(Completion, whole(f"{url}/completions", TEXT | more))
        assert answer.usage is not None


def completions_stream(url: str) -> None:
    for more in ({}, USAGE, {"logprobs": 2}):
        *parts, last = events(f"{url}/completions", TEXT | more)
        for part in parts:
            assert part["choices"][0]["finish_reason"] == ""
            parse(Completion, reworded(part))
        assert parse(Completion, reworded(last)).usage is not None


def echo(url: str) -> None:
    for more in ({}, {"max_tokens": 0}):
        answer = whole(f"{url}/completions", TEXT | {"echo": True, "logprobs": 1} | more)
        columns = answer["choices"][0]["logprobs"]
        assert columns["token_logprobs"].pop(0) is None
        assert columns["top_logprobs"].pop(0) is None
        parse(Completion, answer)


def reworded(part: Any) -> Any:
    """An event of a stream of completions with OpenAI's word for the end, wherever it is."""
    for choice in part["choices"]:
        choice["finish_reason"] = WORDS[choice["finish_reason"]] or "stop"
    return part


def main(url: str) -> None:
    url = f"{url}/v1"
    kept(models, url)
    text = kept(chat, url)
    kept(chat_stream, url)
    kept(stopped, url, text)
    kept(completions, url)
    kept(completions_stream, url)
    kept(echo, url)


if __name__ == "__main__":
    main(sys.argv[1])

"""`huggingface_hub.InferenceClient` against a server: `client_hub.py URL`."""

import asyncio
import json
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError, ValidationError
from promises import MESSAGES, PROMPT, kept, refused


def endpoint(url: str) -> None:
    client = InferenceClient(model=url, provider="hf-inference", timeout=60)
    info = client.get_endpoint_info()
    assert info["router"] == "text-generation-router"
    assert info["max_total_tokens"] > info["max_input_tokens"] > 0
    assert client.health_check()


def text_generation(client: InferenceClient) -> str:
    text = client.text_generation(PROMPT, max_new_tokens=8, return_full_text=False)
    assert isinstance(text, str)
    details = client.text_generation(
        PROMPT, max_new_tokens=8, return_full_text=False, details=True, top_n_tokens=2
    )
    assert details.generated_text == text
    assert details.details is not None
    assert details.details.finish_reason == "length"
    assert details.details.generated_tokens == len(details.details.tokens) == 8
    full = client.text_generation(PROMPT, max_new_tokens=8, return_full_text=True)
    assert full == PROMPT + text
    return text


def text_stream(client: InferenceClient, whole: str) -> None:
    """Plain text token by token, and events with details."""
    ask = {"prompt": PROMPT, "max_new_tokens": 8, "stream": True, "return_full_text": False}
    events = list(client.text_generation(**ask, details=True))
    assert len(events) == 8
    assert events[-1].generated_text == whole
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == "length"
    shown = [event.token.text for event in events if not event.token.special]
    assert list(client.text_generation(**ask)) == shown


def text_sampled(client: InferenceClient) -> None:
    ask = {"do_sample": True, "temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 11}
    texts = {client.text_generation(PROMPT, max_new_tokens=8, **ask) for _ in range(2)}
    assert len(texts) == 1


def chat(client: InferenceClient) -> None:
    ask = {"messages": MESSAGES, "max_tokens": 8, "seed": 1, "temperature": 0.7}
    answer = client.chat_completion(**ask, logprobs=True, top_logprobs=2)
    message = answer.choices[0].message
    assert message.role == "assistant"
    assert answer.choices[0].finish_reason in {"length", "stop"}
    assert answer.choices[0].logprobs is not None
    assert answer.usage.completion_tokens <= 8
    options = {"include_usage": True}
    *chunks, last = client.chat_completion(**ask, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert last.usage is not None
    assert last.usage.completion_tokens == answer.usage.completion_tokens


def grammar(client: InferenceClient) -> None:
    """TGI's `grammar`, and TGI's place for a schema in a `response_format`."""
    regex = {"type": "regex", "value": "(ab|ba){2}"}
    ask = {"grammar": regex, "max_new_tokens": 8, "return_full_text": False}
    text = client.text_generation("x", **ask)
    assert text in ("abab", "abba", "baab", "baba")
    schema = {"properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema |= {"type": "object", "additionalProperties": False}
    answer = client.chat_completion(
        MESSAGES, max_tokens=32, response_format={"type": "json", "value": schema}
    )
    assert json.loads(answer.choices[0].message.content or "")["a"] in (1, 2)


def errors(client: InferenceClient) -> None:
    """Refusals of fields are the client's own class, those of streams too."""
    calls = [
        ("max_new_tokens", lambda: client.text_generation("x", max_new_tokens=0)),
        ("top_p", lambda: list(client.text_generation("x", top_p=3.0, stream=True))),
        ("`inputs` tokens", lambda: client.text_generation("word " * 500, max_new_tokens=5)),
        ("grammar", lambda: client.text_generation("x", grammar={"type": "regex", "value": "("})),
    ]
    for names, call in calls:
        assert names in str(refused(ValidationError, call))
    call = lambda: client.chat_completion(MESSAGES, frequency_penalty=9)  # noqa: E731
    error = refused(HfHubHTTPError, call)
    assert error.response.status_code == 422
    assert "frequency_penalty" in str(error)


def concurrent(url: str, whole: str) -> None:
    asyncio.run(pair(AsyncInferenceClient(base_url=url), whole))


async def pair(client: AsyncInferenceClient, whole: str) -> None:
    ask = {"prompt": PROMPT, "max_new_tokens": 8, "return_full_text": False}
    texts = await asyncio.gather(*(client.text_generation(**ask) for _ in range(2)))
    assert set(texts) == {whole}


def main(url: str) -> None:
    client = InferenceClient(base_url=url, timeout=60)
    kept(endpoint, url)
    whole = kept(text_generation, client)
    kept(text_stream, client, whole)
    kept(text_sampled, client)
    kept(chat, client)
    kept(grammar, client)
    kept(errors, client)
    kept(concurrent, url, whole)


if __name__ == "__main__":
    main(sys.argv[1])

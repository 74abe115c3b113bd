"""The `text-generation` client against a server: `client_tgi.py URL`.

Its streamed chat is left out: it parses `[DONE]` as JSON, whoever sends it.
"""

import asyncio
import sys

from promises import PROMPT, kept, refused
from text_generation import AsyncClient, Client
from text_generation.errors import OverloadedError, UnknownError, ValidationError
from text_generation.types import FinishReason, Message, Response

CHAT = [Message(role="user", content="what is a river?")]
# More than the server has permits for.
REQUESTS = 16


def generate(client: Client) -> Response:
    """The answer is the first of an array, with details, and the same each time."""
    answer = client.generate(PROMPT, max_new_tokens=9, decoder_input_details=True, top_n_tokens=2)
    details = answer.details
    assert details.finish_reason == FinishReason.Length
    assert details.generated_tokens == len(details.tokens) == 9
    assert details.seed is None
    assert all(token.logprob is not None and token.logprob <= 0 for token in details.tokens)
    assert details.top_tokens is not None
    assert details.top_tokens[0][0].id == details.tokens[0].id
    assert len(details.top_tokens) == 9
    again = client.generate(PROMPT, max_new_tokens=9)
    assert again.generated_text == answer.generated_text
    assert again.details.tokens == details.tokens
    return answer


def full_text(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=3, return_full_text=True)
    assert answer.generated_text.startswith(PROMPT)


def stream(client: Client, whole: Response) -> None:
    """One event a token; only the last has the text and the details."""
    events = list(client.generate_stream(PROMPT, max_new_tokens=9))
    assert [event.token for event in events] == whole.details.tokens
    assert all(event.generated_text is None and event.details is None for event in events[:-1])
    assert events[-1].generated_text == whole.generated_text
    assert events[-1].details is not None
    assert events[-1].details.finish_reason == FinishReason.Length
    assert events[-1].details.generated_tokens == 9


def sampled(client: Client) -> None:
    """A seed makes draws the same; `best_of` tells the other sequences."""
    ask = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "typical_p": 0.95}
    ask |= {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "truncate": 40, "seed": 7}
    first, again = (client.generate(PROMPT, max_new_tokens=9, **ask) for _ in range(2))
    assert first.generated_text == again.generated_text
    assert first.details.seed == 7
    best = client.generate(PROMPT, max_new_tokens=5, best_of=2, do_sample=True)
    assert best.details.best_of_sequences is not None
    assert len(best.details.best_of_sequences) == 1


def stop_sequence(client: Client, whole: Response) -> None:
    """The stop string stays in the text."""
    stop = whole.generated_text[2:4]
    answer = client.generate(PROMPT, max_new_tokens=9, stop_sequences=[stop])
    assert answer.details.finish_reason == FinishReason.StopSequence
    assert stop in answer.generated_text
    assert whole.generated_text.startswith(answer.generated_text)
    assert answer.details.generated_tokens < 9


def chat(client: Client) -> None:
    """Every field that is not given is sent as null."""
    ask = {"messages": CHAT, "max_tokens": 6, "temperature": 0.5, "seed": 3}
    answer, again = client.chat(**ask), client.chat(**ask)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert 1 <= answer.usage["completion_tokens"] <= 6
    assert again.choices[0].message == answer.choices[0].message


def errors(client: Client) -> None:
    """Refusals arrive as the client's own classes, those of streams too."""
    calls = [
        ("max_new_tokens", lambda: client.generate("x", max_new_tokens=0)),
        ("`inputs` tokens", lambda: client.generate("word " * 500)),
        ("max_new_tokens", lambda: list(client.generate_stream("x", max_new_tokens=0))),
        ("frequency_penalty", lambda: client.chat(messages=CHAT, frequency_penalty=9.0)),
    ]
    for names, call in calls:
        assert names in str(refused(ValidationError, call))
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = lambda: client.chat(messages=CHAT, tools=tools, tool_choice="g")  # noqa: E731
    assert "`tool_choice` names" in str(refused(UnknownError, call))


def concurrent(client: AsyncClient) -> None:
    asyncio.run(many(client))


async def many(client: AsyncClient) -> None:
    """Requests at the same time do not change each other; too many are refused as overload."""
    ask = {"prompt": PROMPT, "max_new_tokens": 60}
    alone = await client.generate(**ask)
    calls = (client.generate(**ask) for _ in range(REQUESTS))
    answers = await asyncio.gather(*calls, return_exceptions=True)
    served = [answer for answer in answers if isinstance(answer, Response)]
    others = [answer for answer in answers if not isinstance(answer, Response)]
    assert served
    assert all(answer.generated_text == alone.generated_text for answer in served)
    assert others
    assert all(type(answer) is OverloadedError for answer in others), others
    events = [event async for event in client.generate_stream(**ask)]
    assert events[-1].generated_text == alone.generated_text


def main(url: str) -> None:
    client = Client(url, timeout=60)
    whole = kept(generate, client)
    kept(full_text, client)
    kept(stream, client, whole)
    kept(sampled, client)
    kept(stop_sequence, client, whole)
    kept(chat, client)
    kept(errors, client)
    kept(concurrent, AsyncClient(url, timeout=60))


if __name__ == "__main__":
    main(sys.argv[1])

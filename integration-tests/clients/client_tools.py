"""Both SDKs read calls of tools: `client_tools.py URL` of a server that always makes the same."""

import sys

from huggingface_hub import InferenceClient
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from promises import MESSAGES, kept
from strict import events, parse, whole

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ASK = {"model": "tgi", "messages": MESSAGES, "tools": TOOLS}
# What the transcripts of `router/src/tests/golden` say.
CONTENT = "Só\n"
CALLS = [("add", '{"a":1}'), ("add", '{"a":1}')]


def openai_whole(client: OpenAI) -> None:
    choice = client.chat.completions.create(**ASK).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == CONTENT
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert all(call.id and call.type == "function" for call in calls)


def openai_streamed(client: OpenAI) -> None:
    """The SDK's own accumulator puts the pieces together."""
    with client.chat.completions.stream(**ASK) as stream:
        kinds = {event.type for event in stream}
        choice = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == CONTENT
    calls = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert all(call.id == "call_N" and call.type == "function" for call in calls)


def strict_types(url: str) -> None:
    """Calls are of the SDK's types, strictly."""
    url = f"{url}/v1/chat/completions"
    message = parse(ChatCompletion, whole(url, ASK)).choices[0].message
    assert len(message.tool_calls or []) == len(CALLS)
    parts = [parse(ChatCompletionChunk, part) for part in events(url, ASK)]
    assert any(choice.delta.tool_calls for part in parts for choice in part.choices)


def hub_whole(client: InferenceClient) -> None:
    choice = client.chat_completion(MESSAGES, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert all(isinstance(call.function.arguments, str) for call in calls)


def hub_streamed(client: InferenceClient) -> None:
    content, calls, reason = "", list[list[str]](), None
    for chunk in client.chat_completion(MESSAGES, tools=TOOLS, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for part in choice.delta.tool_calls or []:
                if part.index == len(calls):
                    calls.append([part.function.name, ""])
                calls[part.index][1] += part.function.arguments
    assert (content, reason) == (CONTENT, "tool_calls")
    assert [tuple(call) for call in calls] == CALLS


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    kept(openai_whole, client)
    kept(openai_streamed, client)
    kept(strict_types, url)
    client = InferenceClient(base_url=url, timeout=60)
    kept(hub_whole, client)
    kept(hub_streamed, client)


if __name__ == "__main__":
    main(sys.argv[1])

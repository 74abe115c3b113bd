"""`langchain-huggingface` against a server: `client_langchain.py URL`."""

import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint
from promises import PROMPT, kept


def llm(url: str, **options: object) -> HuggingFaceEndpoint:
    # It asks for a temperature of 0.8 whatever `do_sample` says: a seed makes its answers one.
    return HuggingFaceEndpoint(endpoint_url=url, max_new_tokens=8, seed=7, timeout=60, **options)


def invoke(url: str) -> str:
    text = llm(url).invoke(PROMPT)
    assert isinstance(text, str) and text
    return text


def stream(url: str, whole: str) -> None:
    assert "".join(llm(url, streaming=True).stream(PROMPT)) == whole


def stop(url: str, whole: str) -> None:
    # Somewhere in the middle, so that something is left before it.
    word = whole.rsplit(maxsplit=1)[-1]
    text = llm(url).invoke(PROMPT, stop=[word])
    assert word not in text and whole.startswith(text), (text, whole)


def chat(url: str) -> None:
    model = ChatHuggingFace(llm=llm(url), model_id="tgi")
    answer = model.invoke([SystemMessage("be short"), HumanMessage("what is a river?")])
    assert answer.type == "ai" and isinstance(answer.content, str) and answer.content
    assert answer.response_metadata["finish_reason"] in {"length", "stop"}
    chunks = list(model.stream([HumanMessage("what is a river?")]))
    assert "".join(str(chunk.content) for chunk in chunks)


def main(url: str) -> None:
    whole = kept(invoke, url)
    kept(stream, url, whole)
    kept(stop, url, whole)
    kept(chat, url)


if __name__ == "__main__":
    main(sys.argv[1])

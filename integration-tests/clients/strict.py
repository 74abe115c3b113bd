"""Answers as they came, held to the types of OpenAI's SDK: nothing missing, nothing coerced,
nothing besides."""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel

Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], answer: Any) -> Parsed:
    """The answer as a value of its type; fails where that takes any allowance."""
    parsed = kind.model_validate(answer, strict=True)
    for path, extra in extras(parsed, kind.__name__):
        raise AssertionError(f"{path} has no field {extra}")
    return parsed


def extras(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Names of fields that the types do not have, with where they stand."""
    if isinstance(value, list):
        for item in value:
            yield from extras(item, f"{path}[]")
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            yield path, name
        for name in type(value).model_fields:
            yield from extras(getattr(value, name), f"{path}.{name}")


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def whole(url: str, body: dict[str, Any] | None = None) -> Any:
    return json.loads(ask(url, body))


def events(url: str, body: dict[str, Any]) -> list[Any]:
    """The payloads of a stream's events, which are all there is before the last."""
    *payloads, done, rest = ask(url, body | {"stream": True}).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(payload.removeprefix("data: ")) for payload in payloads]

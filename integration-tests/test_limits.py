"""Bad input: one clear sentence with the field and the number, before it costs anything."""

import json
import re
from typing import Any

import pytest

from stack import Stack

VALIDATION = [
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_p": 0}, "top_p"),
    ({"typical_p": 2}, "typical_p"),
    ({"top_k": 0}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 100_000_000}, "max_new_tokens"),
    ({"stop": ["a"] * 9}, "stop"),
    ({"best_of": 9, "do_sample": True}, "best_of"),
    ({"best_of": 2}, "best_of|sampling"),
    ({"top_n_tokens": 1000}, "top_n_tokens"),
    ({"truncate": 0}, "truncate"),
    ({"truncate": 10_000_000}, "truncate"),
    ({"grammar": {"type": "regex", "value": "(((a{1,1000}){1,1000}){1,1000})"}}, "repeats_max"),
]


@pytest.mark.parametrize(("parameters", "names"), VALIDATION, ids=lambda v: json.dumps(v)[:40])
def test_refusal_names_the_field(server: Stack, parameters: dict[str, Any], names: str) -> None:
    status, answer, _ = server.post("/generate", {"inputs": "x", "parameters": parameters})
    assert status == 422, answer
    assert answer["error_type"] == "validation"
    assert re.search(names, answer["error"]), answer


@pytest.mark.parametrize("route", ["/generate", "/generate_stream"])
def test_prompt_beyond_the_context_is_refused_with_both_numbers(server: Stack, route: str) -> None:
    status, answer, _ = server.post(route, {"inputs": "word " * 2000})
    assert status == 422
    assert answer["error_type"] == "validation"
    assert re.search(r"\b51[12]\b", answer["error"]), answer
    assert len(re.findall(r"\d+", answer["error"])) >= 2


def test_total_beyond_the_context_carries_the_three_numbers(server: Stack) -> None:
    body = {"inputs": "x", "parameters": {"max_new_tokens": 600}}
    status, answer, _ = server.post("/generate", body)
    assert status == 422
    assert "512" in answer["error"]
    assert "600" in answer["error"]
    assert "`inputs` tokens" in answer["error"]


MALFORMED = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b'{"inputs": "\\ud800"}', None),
    (b'{"inputs": NaN}', 400),
    (b'{"inputs": 1e999}', None),
    (b'{"inputs": "x", "parameters": {"temperature": 1e999}}', None),
    (b'{"inputs": "x", "parameters": {"seed": -1}}', 422),
    (b'{"inputs": "x", "parameters": {"seed": 99999999999999999999999}}', 422),
    (b'{"inputs": ["x"]}', 422),
    (b"[]", 422),
    (b"null", 422),
    (b"[" * 100_000, None),
    (b'{"inputs": ""}', 422),
    (b'{"parameters": {}}', 422),
]


@pytest.mark.parametrize("route", ["/generate", "/", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(("body", "expected"), MALFORMED, ids=lambda v: repr(v)[:30])
def test_malformed_bodies_are_the_clients_fault(
    server: Stack, route: str, body: bytes, expected: int | None
) -> None:
    status, answer, _ = server.post(route, body)
    assert 400 <= status < 500, (status, answer)
    if expected and route == "/generate":
        assert status == expected, answer


def test_large_body_is_refused_by_its_size(server: Stack) -> None:
    status, _, _ = server.post("/generate", b'{"inputs": "' + b"x" * 10_000_000 + b'"}')
    assert status == 413


def test_unknown_route_and_method(server: Stack) -> None:
    assert server.get("/nowhere")[0] == 404
    assert server.get("/generate")[0] == 405


STREAMS = [
    ("/", ["StreamResponse", "ErrorBody"]),
    ("/generate_stream", ["StreamResponse", "ErrorBody"]),
    ("/v1/completions", ["Completion", "StreamError"]),
    ("/v1/chat/completions", ["ChatChunk", "StreamError"]),
]


@pytest.mark.parametrize(("route", "names"), STREAMS)
def test_document_says_what_the_data_of_an_event_is(
    server: Stack, route: str, names: list[str]
) -> None:
    document = json.loads(server.get("/api-doc/openapi.json")[1])
    answer = document["paths"][route]["post"]["responses"]["200"]
    event = answer["content"]["text/event-stream"]["schema"]
    assert event["required"] == ["data"]
    payload = event["properties"]["data"]["anyOf"][0]["contentSchema"]["anyOf"]
    assert [schema["$ref"].rpartition("/")[2] for schema in payload] == names


def test_server_is_unharmed_by_all_that(server: Stack) -> None:
    assert server.get("/health")[0] == 200
    server.ok("/generate", {"inputs": "still here", "parameters": {"max_new_tokens": 2}})
    assert "panicked" not in server.log

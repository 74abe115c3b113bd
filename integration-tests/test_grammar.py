"""Constrained texts on a real model: they are of their form, and nobody beside them notices."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import validate

from headrace.hub import HubError, resolve
from headrace.hub.default_model import DEFAULT_MODEL_ID
from stack import Stack

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
        "address": {"$ref": "#/$defs/address"},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "zip": {"type": "boolean"}},
            "required": ["city", "zip"],
            "additionalProperties": False,
        }
    },
}
PROMPT = "Describe a person as JSON:"
IP = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"


def tool_schema(parameters: int) -> dict[str, Any]:
    """A function's arguments, as large as those of agents."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 4},
        {"type": "integer", "minimum": 0, "maximum": 9},
        {"enum": ["left", "right", "both"]},
        {"type": "boolean"},
    ]
    fields = {
        f"parameter_{i}": kinds[i % 4] | {"description": f"What it is, {i}. " * 20}
        for i in range(parameters)
    }
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields)[:6],
        "additionalProperties": False,
    }


@pytest.fixture(scope="module")
def model() -> Iterator[Stack]:
    try:
        resolve(DEFAULT_MODEL_ID)
    except HubError as error:
        pytest.skip(f"the default model is not to be had here: {error}")
    # A loaded machine is late: it may take its time, and no test is about that.
    with Stack("--kv-memory", "256MiB", "--mask-ms-max", "1000") as stack:
        yield stack.wait_ready()


def generate(model: Stack, **parameters: Any) -> dict[str, Any]:
    given = {"max_new_tokens": 120, "details": True} | parameters
    return model.ok("/generate", {"inputs": PROMPT, "parameters": given})


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` gives, called by so many threads at one time."""
    found: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            found[i] = work(i)
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.3, "top_p": 0.8, "seed": 2},
        {"do_sample": True, "top_k": 5, "seed": 3, "repetition_penalty": 1.2},
        {"typical_p": 0.5, "seed": 4, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_json_validates(model: Stack, how: dict[str, Any]) -> None:
    answer = generate(model, grammar={"type": "json", "value": PERSON}, top_n_tokens=2, **how)
    assert answer["details"]["finish_reason"] == "eos_token"
    validate(json.loads(answer["generated_text"]), PERSON)
    tokens = answer["details"]["tokens"]
    assert tokens[-1]["special"] and all(t["logprob"] is not None for t in tokens)


@pytest.mark.parametrize("pattern", [IP, r"(yes|no|maybe)!", r"[A-Z][a-z]{3,8}( [A-Z][a-z]{2,5})?"])
def test_a_regex_matches(model: Stack, pattern: str) -> None:
    for seed in (1, 2):
        grammar = {"type": "regex", "value": pattern}
        answer = generate(model, grammar=grammar, do_sample=True, seed=seed)
        assert re.fullmatch(pattern, answer["generated_text"]), answer
        assert answer["details"]["finish_reason"] == "eos_token"


def test_streams_are_constrained_as_well(model: Stack) -> None:
    grammar = {"type": "json", "value": PERSON}
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 120, "grammar": grammar}}
    events = list(model.stream("/generate_stream", body))
    text = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    validate(json.loads(text), PERSON)
    assert events[-1]["generated_text"] == text
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    chat = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 120,
        "stream": True,
        "response_format": schema,
    }
    *chunks, done = model.stream("/v1/chat/completions", chat)
    text = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks)
    assert done == "[DONE]" and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    validate(json.loads(text), PERSON)


def test_openai_routes_and_several_answers(model: Stack) -> None:
    any_object = {"response_format": {"type": "json_object"}, "temperature": 0.7, "seed": 1}
    prompt = 'A JSON object with one field "a": '
    answer = model.ok("/v1/completions", {"prompt": prompt, "max_tokens": 200} | any_object)
    if answer["choices"][0]["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["choices"][0]["text"]), dict)
    assert answer["choices"][0]["text"].startswith("{")
    chat = {
        "messages": [{"role": "user", "content": "Yes or no?"}],
        "n": 3,
        "logprobs": True,
        "grammar": 'start: "yes" | "no"',
    }
    choices = model.ok("/v1/chat/completions", chat)["choices"]
    assert len(choices) == 3
    assert all(choice["message"]["content"] in ("yes", "no") for choice in choices)


def test_stop_sequences_and_lengths_cut_a_constrained_text(model: Stack) -> None:
    digits = {"type": "regex", "value": "[0-4]{5}x[5-9]{5}"}
    answer = generate(model, grammar=digits, stop=["x"])
    assert re.fullmatch("[0-4]{5}x", answer["generated_text"])
    assert answer["details"]["finish_reason"] == "stop_sequence"
    answer = generate(model, grammar=digits, max_new_tokens=3)
    assert re.fullmatch("[0-4]{3}", answer["generated_text"])
    assert answer["details"]["finish_reason"] == "length"


def test_a_seed_decides_a_constrained_text(model: Stack) -> None:
    grammar = {"type": "json", "value": PERSON}
    texts = [
        generate(model, grammar=grammar, temperature=1.0, seed=7)["generated_text"]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_neighbours_of_constrained_requests_draw_what_they_draw_alone(model: Stack) -> None:
    def free(i: int) -> list[int]:
        body = {"inputs": f"{i} things to know:", "parameters": {"max_new_tokens": 24}}
        body["parameters"] |= {"details": True, "temperature": 0.9, "seed": i}
        return [t["id"] for t in model.ok("/generate", body)["details"]["tokens"]]

    def either(i: int) -> Any:
        if i % 2:
            return free(i)
        return generate(model, grammar={"type": "json", "value": PERSON}, seed=i, do_sample=True)

    alone = {i: free(i) for i in (1, 3, 5, 7)}
    found = together(8, either)
    for i, tokens in alone.items():
        assert found[i] == tokens
    for i in (0, 2, 4, 6):
        validate(json.loads(found[i]["generated_text"]), PERSON)


def test_sixteen_at_one_time_with_schemas_of_tools(model: Stack) -> None:
    schemas = [tool_schema(24 + i) for i in range(4)]
    size = len(json.dumps(schemas[0]))
    assert size > 8000

    def one(i: int) -> tuple[int, dict[str, Any]]:
        grammar = {"type": "json", "value": schemas[i % 4]}
        return i, generate(model, grammar=grammar, temperature=0.8, seed=i, max_new_tokens=400)

    for i, answer in together(16, one):
        assert answer["details"]["finish_reason"] == "eos_token", answer["generated_text"]
        validate(json.loads(answer["generated_text"]), schemas[i % 4])
    assert model.metric("headrace_masks_missed") == 0


def test_bombs_are_refused_by_name_and_the_server_lives(model: Stack) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(55):
        deep = {"type": "object", "properties": {"a": deep}}
    values = [f"value {i}" for i in range(80_000)]
    bombs = [
        ({"type": "regex", "value": "(((a{1,1000}){1,1000}){1,1000})"}, "repeats_max"),
        ({"type": "json", "value": deep}, "depth_max"),
        ({"type": "json", "value": {"properties": {"a": {"enum": values}}}}, "source_bytes_max"),
        (
            {"type": "json", "value": {"properties": {"a": {"multipleOf": 7919.9973}}}},
            "multiple_max",
        ),
        ({"type": "regex", "value": "("}, "unclosed group"),
    ]
    for grammar, name in bombs:
        body = {"inputs": PROMPT, "parameters": {"grammar": grammar}}
        status, answer, _ = model.post("/generate", body)
        assert status == 422, (status, answer)
        assert name in answer["error"] and answer["error_type"] == "validation"
    assert model.get("/health")[0] == 200

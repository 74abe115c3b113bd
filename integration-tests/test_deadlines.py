"""Deadlines over the whole server: an answer in time, an error that says why, and nothing held."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack import FLAGS, Stack

LONG = {"inputs": "a text", "parameters": {"max_new_tokens": 480, "ignore_eos": True}}
SHORT = {"inputs": "a text", "parameters": {"max_new_tokens": 2}}


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Iterator[Stack]:
    """A server that runs one sequence at a time."""
    with Stack("--model-id", str(tiny_model), *FLAGS, "--max-running", "1") as stack:
        yield stack.wait_ready()


def wait_until_nothing_is_held(server: Stack) -> None:
    give_up = time.monotonic() + 30
    while server.metric("headrace_kv_blocks_used") or server.metric("tgi_queue_size"):
        assert time.monotonic() < give_up, "blocks of a request that is over are held"
        time.sleep(0.02)


def test_what_takes_longer_ends_and_frees_what_it_held(alone: Stack) -> None:
    stream = alone.stream("/generate_stream", LONG)
    next(stream)  # It runs, and has the only slot.
    status, answer, _ = alone.post("/generate", SHORT, x_request_timeout="0.02")
    assert (status, answer["error_type"]) == (504, "deadline")
    assert "0.02 s (`x-request-timeout`), and waited for the model" in answer["error"]
    assert alone.metric("headrace_deadlines_passed", state="waiting") == 1
    assert alone.metric("headrace_requests_rejected", reason="deadline") == 1
    stream.close()
    wait_until_nothing_is_held(alone)
    status, answer, _ = alone.post("/generate", LONG, x_request_timeout="0.06")
    assert (status, answer["error_type"]) == (504, "deadline")
    wait_until_nothing_is_held(alone)
    assert alone.post("/generate", SHORT, x_request_timeout="600")[0] == 200


def test_a_deadline_in_a_stream_is_its_last_event(tiny_model: Path) -> None:
    flags = ("--model-id", str(tiny_model), *FLAGS, "--request-timeout", "0.1")
    with Stack(*flags) as server:
        events = list(server.wait_ready().stream("/generate_stream", LONG))
    assert events[-1]["error_type"] == "deadline"
    assert "0.1 s (`x-request-timeout`)" in events[-1]["error"]
    assert all("token" in event for event in events[:-1])

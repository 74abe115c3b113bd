"""Bytes nobody should send, drawn from a fixed seed: refused, and nothing is left behind."""

import json
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stack import Stack

SEED = 20260101
BODIES_PER_ROUTE = 300
REQUESTS = 400
# Answers are short and the pool is small, so that what is not given back is missed soon.
FLAGS = ("--dtype", "float32", "--threads", "1", "--max-total-tokens", "120")
POOL = ("--kv-memory", "4000000", "--max-concurrent-requests", "16")
SETTLE_SECONDS_MAX = 20.0
# An unfinished request is not answered.
SILENCE_SECONDS = 0.4
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
# What the router's allocator may keep of some thousand requests.
GROWTH_BYTES_MAX = 64 << 20

PARAMETERS = {
    "best_of": 1,
    "temperature": 0.7,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "top_k": 5,
    "top_p": 0.9,
    "typical_p": 0.9,
    "min_p": 0.05,
    "do_sample": True,
    "max_new_tokens": 4,
    "return_full_text": False,
    "stop": ["zz", "\n"],
    "truncate": 30,
    "details": True,
    "decoder_input_details": False,
    "seed": 5,
    "top_n_tokens": 2,
    "adapter_id": None,
    "grammar": None,
    "watermark": True,
}
GENERATE = {"inputs": "a river, a lake", "parameters": PARAMETERS}
OPENAI = {
    "model": "tgi",
    "max_tokens": 4,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "seed": -5,
    "stop": ["zz"],
    "n": 2,
    "logit_bias": {"17": -3.5},
    "frequency_penalty": 0.5,
    "stream_options": {"include_usage": True},
    "user": "someone",
}
CHAT = OPENAI | {
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is a river?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {}}]},
        {"role": "tool", "content": "water", "tool_call_id": "1", "name": "look"},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "chat_template_kwargs": {"enable_thinking": False},
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
TOOLS = CHAT | {
    "tools": [TOOL, {"function": {"name": "go", "arguments": {}, "description": "goes"}}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
    "tool_prompt": "look first",
    "parallel_tool_calls": False,
}
COMPLETION = OPENAI | {"prompt": ["a river", "a lake"], "logprobs": 2}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/", GENERATE | {"stream": False}),
    ("/", GENERATE | {"stream": True}),
    ("/generate", GENERATE),
    ("/generate_stream", GENERATE),
    ("/tokenize", GENERATE),
    ("/chat_tokenize", CHAT),
    ("/chat_tokenize", TOOLS),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
]

# Takes the place of one value of a body: JSON and what only looks like it.
VALUES = [
    *(b"null", b"true", b"false", b"0", b"-0", b"-1", b"1", b"-0.0", b"1.5", b'"7"', b"[]", b"{}"),
    *(b"2147483648", b"4294967295", b"4294967296", b"-2147483649", b"18446744073709551615"),
    *(b"18446744073709551616", b"-9223372036854775808", b"-9223372036854775809", b"9" * 400),
    *(b"1e38", b"3.5e38", b"1e-46", b"-1e39", b"1e308", b"1e309", b"1e999", b"5e-324", b"1E+2"),
    *(b"NaN", b"Infinity", b"-Infinity", b"nan", b"0x10", b"01", b"+1", b"1.", b".5", b"1_000"),
    *(b'""', b'" "', b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\ud83d\\ude00"', b"'a'"),
    *(b'"\xff\xfe"', b'"\xed\xa0\x80"', b'"\xf0\x9f"', b'"\xc0\x80"', b'"\x01"', b'"\xef\xbf\xbf"'),
    *(b'"' + b"long " * 400 + b'"', b'"' + "\u202e\u200d\U0001f469".encode() * 50 + b'"'),
    *(b'"<|im_end|>"', b'"<|im_start|>user"', b'"{{ 1/0 }}"', b'"{% for %}"', b'"\\\\"', b'"'),
    *(b"[" * 60 + b"]" * 60, b"[" * 500, b'{"a":' * 200, b"[0" + b",0" * 3000 + b"]"),
    *(b'["a"]', b'[""]', b"[null]", b"[[1,2],[3]]", b'{"type":"json","value":{}}', b'{"0":1}'),
    *(b'{"999999999":1}', b'{"-1":1}', b'{"a":"b"}', b'{"1":1e39}', b"[1e39]", b'[{"role":1}]'),
]
MARK = "\u2402mark"
HEAD = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"inputs": "x", "parameters": {"max_new_tokens": 2}}'


@pytest.fixture(scope="module")
def fuzzed(tiny_model: Path) -> Iterator[Stack]:
    with Stack("--model-id", str(tiny_model), *FLAGS, *POOL) as stack:
        yield stack.wait_ready()


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a body where a value is."""
    yield at
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        for key in keys:
            yield from paths(value[key], (*at, key))


def marked(value: Any, at: tuple[Any, ...]) -> Any:
    """The body with a mark in place of one value."""
    if not at:
        return MARK
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = marked(value[at[0]], at[1:])
    return copy


def replaced(body: Any, draw: random.Random) -> bytes:
    """One to three values become something else."""
    text = json.dumps(body).encode()
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        try:
            body = json.loads(text)
        except ValueError:
            return text
        at = draw.choice(list(paths(body)))
        text = json.dumps(marked(body, at)).encode()
        text = text.replace(json.dumps(MARK).encode(), draw.choice(VALUES), 1)
    return text


def doubled(body: Any, draw: random.Random) -> bytes:
    """A key is there twice, the second time with another value."""
    at = draw.choice([path for path in paths(body) if path and isinstance(path[-1], str)])
    text = json.dumps(marked(body, at)).encode()
    key = json.dumps(at[-1]).encode() + b": "
    twice = draw.choice(VALUES) + b", " + key + draw.choice(VALUES)
    return text.replace(json.dumps(MARK).encode(), twice, 1)


def damaged(body: Any, draw: random.Random) -> bytes:
    """Bytes are flipped, put in and taken away."""
    text = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.5).encode())
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(text))
        kind = draw.randrange(3)
        if kind == 0:
            text[at] = draw.randrange(256)
        elif kind == 1:
            text[at:at] = draw.randbytes(draw.randint(1, 4))
        else:
            del text[at : at + draw.randint(1, 5)]
    return bytes(text)


def cut(body: Any, draw: random.Random) -> bytes:
    """The body ends early, or goes on after its end."""
    text = json.dumps(body).encode()
    if draw.random() < 0.2:
        return text + draw.choice((b"}", b"\x00", text, b" " * 9000, b"\n\n", b"\xef\xbb\xbf"))
    return text[: draw.randrange(len(text))]


def recoded(body: Any, draw: random.Random) -> bytes:
    """The same text in an encoding that JSON does not have."""
    return json.dumps(body).encode(draw.choice(("utf-16", "utf-32-le", "utf-8-sig", "cp037")))


MUTATIONS = (replaced, replaced, replaced, replaced, doubled, damaged, damaged, cut, recoded)


def judge(path: str, body: bytes, status: int, answer: Any, kind: str) -> None:
    """What holds for every answer, whatever was asked."""
    shown = (path, body[:400], status, answer if isinstance(answer, dict) else str(answer)[:400])
    assert 200 <= status < 500, shown
    if kind == "text/event-stream":
        for line in answer.splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                assert isinstance(json.loads(line[6:]), dict), shown
    elif kind == "application/json" and status != 200:
        assert answer["error"], shown
        assert answer["error_type"], shown


@pytest.mark.parametrize("case", range(len(ROUTES)), ids=lambda case: f"{case}{ROUTES[case][0]}")
def test_mutated_bodies_are_answered_or_refused(fuzzed: Stack, case: int) -> None:
    path, body = ROUTES[case]
    draw = random.Random(f"{SEED}-{case}")
    fuzzed.ok(path, body)
    statuses: Counter[int] = Counter()
    for _ in range(BODIES_PER_ROUTE):
        text = draw.choice(MUTATIONS)(body, draw)
        status, answer, headers = fuzzed.post(path, text)
        judge(path, text, status, answer, headers.get("content-type", "").partition(";")[0])
        statuses[status] += 1
    # The mutations are neither all harmless nor all hopeless.
    assert statuses[200], statuses
    assert statuses[400], statuses
    assert statuses[422], statuses


def head(*lines: str, target: str = "/generate", length: int | str = len(BODY)) -> bytes:
    """The head of a request with more header lines."""
    more = "".join(f"{line}\r\n" for line in lines)
    start = HEAD.replace("/generate", target)
    return f"{start}Content-Length: {length}\r\n{more}\r\n".encode("latin-1")


def chunks(*parts: bytes) -> bytes:
    start = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
    return start + b"".join(parts)


CHUNK = f"{len(BODY):x}".encode() + b"\r\n" + BODY + b"\r\n"
LENGTHS = (-1, "+5", "0x10", "1e3", "", "5, 5", "9" * 40)
BYTEWISE = [b"1\r\n" + BODY[i : i + 1] + b"\r\n" for i in range(len(BODY))]
# What is sent, and the statuses that come back: none where the request has no end yet.
FRAMES: list[tuple[bytes, list[int]]] = [
    # Lengths that are not the body's.
    (head(length=len(BODY) + 50) + BODY, []),
    (head(length=len(BODY) - 5) + BODY, [400, 400]),
    (head(length=0) + BODY, [400, 400]),
    (head(length="9" * 19) + BODY, []),
    *((head(length=length) + BODY, [400]) for length in LENGTHS),
    (head(f"Content-Length: {len(BODY) + 1}") + BODY, [400]),
    (head("Transfer-Encoding: chunked") + CHUNK + b"0\r\n\r\n", [200]),
    # Chunks.
    (chunks(CHUNK, b"0\r\n\r\n"), [200]),
    (chunks(*BYTEWISE, b"0\r\nX: y\r\n\r\n"), [200]),
    (chunks(CHUNK), []),
    (chunks(CHUNK[:9]), []),
    (chunks(b"zz\r\n", BODY), [400]),
    (chunks(b"-1\r\n", BODY), [400]),
    (chunks(b"f" * 16 + b"\r\n", BODY), []),
    (chunks(b"f" * 40 + b"\r\n", BODY), [400]),
    (chunks(b"2;" + b"x" * 20_000 + b"\r\n{}\r\n0\r\n\r\n"), [400]),
    (chunks(CHUNK, b"0\r\n", b"X: y\r\n" * 5000, b"\r\n"), [400]),
    (HEAD.encode() + b"Transfer-Encoding: identity\r\n\r\n" + BODY, [400]),
    # Headers.
    (head("Expect: 100-continue") + BODY, [200]),
    (head("Expect: something") + BODY, [200]),
    (head("Upgrade: websocket", "Connection: upgrade") + BODY, [200]),
    (head("X: \xff\xfe") + BODY, [200]),
    (head("Authorization: Bearer \xe9", "Cookie: ;;;=") + BODY, [200]),
    (head("traceparent: 00-zz-zz-zz", "tracestate: ,,,=", "baggage: %%%") + BODY, [200]),
    (head("traceparent: ff-" + "0" * 32 + "-" + "0" * 16 + "-ff") + BODY, [200]),
    (head("X-Request-Id: " + "a" * 9000, "Accept: */*;q=9", "Origin: null") + BODY, [200]),
    (head("X: \x00") + BODY, [400]),
    (head("X : y") + BODY, [400]),
    (head(" folded: y") + BODY, [400]),
    (head("X: y\r\n z") + BODY, [400]),
    (head("nothing") + BODY, [400]),
    (head(": y") + BODY, [400]),
    (head(*(f"X-{i}: y" for i in range(300))) + BODY, [431]),
    # Request lines.
    (head(target="/generate?" + "%" * 100) + BODY, [200]),
    (head(target="http://elsewhere/generate") + BODY, [200]),
    (head(target="/" + "a" * 70_000) + BODY, [414]),
    (head(target="/%00/../generate") + BODY, [404]),
    (head(target="//generate") + BODY, [404]),
    (head(target="*") + BODY, [404]),
    (head(target="/v1/models/%ff%fe") + BODY, [405]),
    (head(target="/gen\xe9rate") + BODY, [400]),
    (b"GET /v1/models/" + b"%2e%2e%2f" * 50 + b" HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    (b"GET /v1/models/\xff HTTP/1.1\r\nHost: x\r\n\r\n", [400]),
    (b"GET /health HTTP/1.1\r\n\r\n", [200]),
    (b"GET /health HTTP/1.0\r\n\r\n", [200]),
    (b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n", [400]),
    (b"GET /health\r\n\r\n", [400]),
    (b"get /health HTTP/1.1\r\nHost: x\r\n\r\n", [405]),
    (b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    (b"TRACE /generate HTTP/1.1\r\nHost: x\r\n\r\n", [405]),
    (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    (b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", [200]),
    # Several requests in one write, another protocol, and nothing.
    ((head() + BODY) * 9, [200] * 9),
    (head() + BODY + b"rubbish " + head() + BODY, [200, 400]),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(range(256)) * 4, []),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500, [400]),
    (b"\r\n" * 1000, []),
    (b"", []),
]


def raw(stack: Stack, data: bytes, silence: float, shut: bool = False) -> list[int]:
    """The final statuses of what comes back until nothing does for `silence` seconds.

    `shut` closes the writing side, which the server takes for a client that left.
    """
    answer, final = b"", []
    with socket.create_connection(("127.0.0.1", stack.port)) as connection:
        try:
            connection.settimeout(silence)
            connection.sendall(data)
            if shut:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
                final = [int(status) for status in STATUS.findall(answer) if status[:1] != b"1"]
                connection.settimeout(min(silence, 0.1) if final else silence)
        except OSError:
            # Nothing came for long, or the server did not read what it had refused.
            pass
    assert all(status < 500 for status in final), (data[:2000], answer[:2000])
    return final


@pytest.mark.parametrize(("data", "expected"), FRAMES, ids=range(len(FRAMES)))
def test_odd_frames_and_headers_are_survived(
    fuzzed: Stack, data: bytes, expected: list[int]
) -> None:
    assert raw(fuzzed, data, SILENCE_SECONDS) == expected, data[:300]


def test_mutated_requests_are_survived(fuzzed: Stack) -> None:
    """Bytes of whole requests are flipped, put in and taken away."""
    draw = random.Random(SEED)
    for _ in range(REQUESTS):
        data = bytearray(draw.choice(FRAMES)[0][:2000])
        for _ in range(draw.randint(1, 8)):
            at = draw.randrange(len(data) + 1)
            data[at : at + draw.randint(0, 2)] = draw.randbytes(draw.randint(0, 3))
        raw(fuzzed, bytes(data), 0.02, shut=draw.random() < 0.8)


def test_clients_that_leave_or_stall_hold_nothing(fuzzed: Stack) -> None:
    """Connections closed within a request or a stream, and some that stay half open."""
    stalled = []
    streaming = {"inputs": "x", "parameters": {"max_new_tokens": 40}}
    text = json.dumps(streaming).encode()
    whole = head(target="/generate_stream", length=len(text)) + text
    draw = random.Random(SEED)
    for index in range(60):
        connection = socket.create_connection(("127.0.0.1", fuzzed.port), timeout=10.0)
        connection.sendall(whole if index % 2 else whole[: draw.randrange(len(whole))])
        if index % 4 == 1:
            connection.recv(1)
        if index < 8:
            stalled.append(connection)
        else:
            connection.close()
    assert fuzzed.get("/health")[0] == 200
    for connection in stalled:
        connection.close()


def router(stack: Stack) -> Path:
    """The router's folder in /proc."""
    folders = [Path(f"/proc/{pid}") for pid in stack.children()]
    return next(f for f in folders if b"router" in (f / "cmdline").read_bytes().split(b"\0"))


def resident(stack: Stack) -> int:
    """Bytes of memory that the router holds."""
    text = (router(stack) / "status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) << 10


def test_memory_does_not_grow_with_refusals(fuzzed: Stack) -> None:
    """Runs after the others here, so that the allocator has what it needs."""
    before = resident(fuzzed)
    large = b'{"inputs": "' + b"x" * 1_900_000 + b'", "parameters": {"top_k": 0}}'
    deep = b'{"inputs": "x", "other": ' + b"[" * 1_000_000
    for _ in range(12):
        for body in (large, deep):
            assert 400 <= fuzzed.post("/generate", body)[0] < 500
    assert resident(fuzzed) - before < GROWTH_BYTES_MAX


def test_nothing_is_left_behind(fuzzed: Stack) -> None:
    """All blocks are free again, nothing runs or waits, nothing panicked, the server serves."""
    give_up = time.monotonic() + SETTLE_SECONDS_MAX
    total = fuzzed.metric("headrace_kv_blocks")
    held = ["tgi_batch_current_size", "tgi_queue_size"]
    while time.monotonic() < give_up:
        idle = not any(fuzzed.metric(name) for name in held)
        if idle and fuzzed.metric("headrace_kv_blocks_free") == total:
            break
        time.sleep(0.1)
    assert total > 0
    assert fuzzed.metric("headrace_kv_blocks_free") == total
    assert [fuzzed.metric(name) for name in held] == [0, 0]
    assert fuzzed.get("/health")[0] == 200
    answers = [fuzzed.ok("/generate", GENERATE)["generated_text"] for _ in range(2)]
    assert answers[0] == answers[1]
    assert "panicked" not in fuzzed.log
    assert resident(fuzzed) < 512 << 20

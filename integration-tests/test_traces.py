"""One trace a request, across router and shard, at a real collector; and without any."""

import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collector import CERTIFICATES, Collector, Front
from stack import FLAGS, READY_SECONDS_MAX, Stack

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
# Prompts longer than a step are computed in chunks.
CHUNK = ("--max-batch-prefill-tokens", "32")
NAMES = ("stream", "shard.prefill", "shard.decode")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def traced(model: Path, endpoint: str, **environment: str) -> Stack:
    flags = ("--model-id", str(model), *FLAGS, *CHUNK, "--otlp-endpoint", endpoint)
    return Stack(*flags, OTEL_BSP_SCHEDULE_DELAY="50", **environment)


def send(
    stack: Stack, path: str, body: Any, **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    """A POST with headers; status, the whole answer, and its headers."""
    connection = stack.connect()
    try:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        fields["Content-Type"] = "application/json"
        connection.request("POST", path, json.dumps(body).encode(), fields)
        reply = connection.getresponse()
        return reply.status, reply.read().decode(), reply.headers
    finally:
        connection.close()


def generation(tokens: int, **more: Any) -> dict[str, Any]:
    return {"inputs": "one two three four " * 12, "parameters": {"max_new_tokens": tokens} | more}


def tree(spans: list[dict[str, Any]], root: str) -> dict[str, Any]:
    """Names below a span, repeated ones once."""
    below: dict[str, Any] = {}
    for span in spans:
        if span["parent"] == root:
            below.setdefault(span["name"], {}).update(tree(spans, span["id"]))
    return below


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_streamed_request_is_one_tree_across_router_and_shard(
    tiny_model: Path, collector: Collector, protocol: str
):
    trace = TRACE[:-1] + ("c" if protocol == "grpc" else "d")
    port = collector.grpc if protocol == "grpc" else collector.http
    environment = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_SERVICE_NAME": "llm"}
    with traced(tiny_model, f"http://127.0.0.1:{port}", **environment) as stack:
        stack.wait_ready()
        status, _, headers = send(
            stack,
            "/generate_stream",
            generation(5, ignore_eos_token=True),
            traceparent=f"00-{trace}-{CALLER}-01",
            tracestate="vendor=1",
        )
        assert status == 200
        spans = collector.spans(*NAMES, trace=trace)
    assert tree(spans, CALLER) == {
        "POST /generate_stream": {
            "generate_stream": {
                "validate": {"tokenize": {}},
                "queued": {},
                "infer": {"prefill": {"shard.prefill": {}}, "decode": {"shard.decode": {}}},
                "stream": {},
            }
        }
    }
    by_name = {span["name"]: span for span in spans}
    server = by_name["POST /generate_stream"]
    assert headers["traceparent"] == f"00-{trace}-{server['id']}-01"
    assert headers["tracestate"] == server["state"] == "vendor=1"
    assert server["attributes"]["http.response.status_code"] == 200
    handler = by_name["generate_stream"]["attributes"]
    assert handler["gen_ai.request.max_tokens"] == handler["gen_ai.usage.output_tokens"] == 5
    assert handler["gen_ai.response.finish_reasons"] == ["length"]
    fields = {"parameters", "total_time", "validation_time", "queue_time", "inference_time"}
    assert handler.keys() >= fields | {"time_per_token", "seed"}
    assert by_name["queued"]["attributes"]["headrace.wait.reason"] == "none"
    chunks = [span["attributes"] for span in spans if span["name"] == "prefill"]
    counts = [chunk["headrace.prefill.tokens"] for chunk in chunks]
    assert len(counts) > 1 and sum(counts) == handler["gen_ai.usage.input_tokens"]
    on_shard = [span for span in spans if span["name"] == "shard.prefill"]
    steps = [chunk["headrace.step"] for chunk in chunks]
    assert [span["attributes"]["headrace.step"] for span in on_shard] == steps
    assert all(span["attributes"]["headrace.device_ms"] > 0 for span in on_shard)
    assert by_name["shard.decode"]["attributes"]["headrace.decode.steps"] == 4
    assert {span["resource"]["service.name"] for span in spans} == {"llm"}
    components = {span["name"]: span["resource"]["headrace.component"] for span in spans}
    assert (components["infer"], components["shard.decode"]) == ("router", "shard")


def test_the_sampler_decides_and_follows_the_caller(tiny_model: Path, collector: Collector):
    endpoint = f"http://127.0.0.1:{collector.grpc}"
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_always_off"}
    skipped, taken = "1" * 32, "2" * 32
    with traced(tiny_model, endpoint, **sampler) as stack:
        stack.wait_ready()
        for trace, flag in ((skipped, "00"), (taken, "01")):
            parent = f"00-{trace}-{CALLER}-{flag}"
            status, _, headers = send(stack, "/generate", generation(2), traceparent=parent)
            assert status == 200
            assert ("traceparent" in headers) == (trace == taken)
        send(stack, "/generate", generation(2))
    # Those of the sampled one are there, and a process that has ended sends no more.
    spans = collector.spans("infer", "shard.prefill", trace=taken)
    assert {span["name"] for span in spans} >= {"POST /generate", "generate", "queued"}
    traces = {span["trace"] for span in collector.spans()}
    assert skipped not in traces
    assert traces <= {taken} | {TRACE[:-1] + end for end in "cd"}, "nobody else was sampled"


def test_the_spans_of_a_drain_are_exported(tiny_model: Path, collector: Collector):
    trace = "3" * 32
    # Nothing is sent before the end unless the end sends it.
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    flags = ("--model-id", str(tiny_model), *FLAGS)
    endpoint = f"http://127.0.0.1:{collector.grpc}"
    with Stack(*flags, "--otlp-endpoint", endpoint, **environment) as stack:
        stack.wait_ready()
        parent = f"00-{trace}-{CALLER}-01"
        connection = stack.connect()
        body = json.dumps(generation(200, ignore_eos_token=True)).encode()
        fields = {"Content-Type": "application/json", "traceparent": parent}
        connection.request("POST", "/generate_stream", body, fields)
        reply = connection.getresponse()
        assert reply.readline().startswith(b"data:"), "it runs"
        stack.process.send_signal(signal.SIGTERM)
        assert b"generated_text" in reply.read()
        connection.close()
        assert stack.wait_exit() == 0
    spans = collector.spans(*NAMES, trace=trace)
    decode = next(span for span in spans if span["name"] == "decode")
    assert decode["attributes"]["headrace.decode.tokens"] == 199


def test_a_collector_that_hangs_keeps_nobody_from_serving(tiny_model: Path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        endpoint = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        environment = {"OTEL_BSP_MAX_QUEUE_SIZE": "20", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "10"}
        with traced(tiny_model, endpoint, **environment) as stack:
            stack.wait_ready()
            for _ in range(8):
                assert send(stack, "/generate", generation(2))[0] == 200
            stack.process.send_signal(signal.SIGTERM)
            assert stack.wait_exit() == 0
            assert stack.log.count("Spans are dropped") == 1
            assert stack.log.count("Not all spans reached the collector") == 1


def failed(stack: Stack, more_than: float) -> float:
    """Spans of the router that did not arrive, once they are more than so many."""
    give_up = time.monotonic() + READY_SECONDS_MAX
    while True:
        count = stack.metric("headrace_trace_spans", outcome="failed")
        if count > more_than:
            return count
        assert time.monotonic() < give_up, "nothing failed"
        time.sleep(0.02)


def test_spans_go_by_tls_to_a_collector_that_is_what_its_certificate_says(
    tiny_model: Path, collector: Collector
):
    trace = "4" * 32
    environment = {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(CERTIFICATES / "ca.pem"),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(CERTIFICATES / "client.pem"),
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY": str(CERTIFICATES / "client.key"),
    }
    with (
        # Of the right authority, but no server's.
        Front(collector.grpc, "client") as front,
        traced(tiny_model, f"https://127.0.0.1:{front.port}", **environment) as stack,
    ):
        stack.wait_ready()
        count = 0.0
        for _ in range(2):
            assert send(stack, "/generate", generation(2))[0] == 200
            count = failed(stack, count)
        why = "there is no TLS with it: invalid peer certificate"
        assert stack.log.count(why) == stack.log.count("The collector takes no spans") == 1
        front.certificate = "server"
        parent = f"00-{trace}-{CALLER}-01"
        assert send(stack, "/generate", generation(2), traceparent=parent)[0] == 200
        spans = collector.spans("infer", "shard.prefill", "shard.decode", trace=trace)
        assert {span["name"] for span in spans} >= {"POST /generate", "generate", "queued"}
        assert "The collector takes spans again" in stack.log


def test_a_waterfall_in_the_answer_needs_no_collector(server: Stack):
    status, text, _ = send(server, "/generate", generation(3), x_trace="inline")
    assert status == 200
    told = json.loads(text)["trace"]
    names = [span["name"] for span in told["spans"]]
    assert names[:3] == ["POST /generate", "generate", "validate"]
    assert {"queued", "infer", "prefill", "decode"} <= set(names)
    by_name = {span["name"]: span for span in told["spans"]}
    assert by_name["queued"]["attributes"]["headrace.wait.reason"] == "none"
    assert by_name["infer"]["parent_span_id"] == by_name["generate"]["span_id"]
    for path, body in (
        ("/generate_stream", generation(3)),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "stream": True},
        ),
    ):
        status, text, _ = send(server, path, body, x_trace="inline")
        events = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
        assert status == 200
        assert ["trace" in json.loads(event) for event in events] == [False] * (len(events) - 1) + [
            True
        ]
        spans = json.loads(events[-1])["trace"]["spans"]
        assert spans[0]["name"] == f"POST {path}"
        assert "stream" in [span["name"] for span in spans]
    assert "trace" not in json.loads(send(server, "/generate", generation(3))[1])

"""Executed plans to spans, without a collector; and what a machine without the SDK does."""

import builtins
import logging
import queue
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from test_batch import first_plan, i32
from test_config import example

from headrace.config import ClientCertificate, Serve, Tls
from headrace.telemetry import NoTracer
from headrace.tracing import (
    LINKS_MAX,
    STEPS_MAX,
    OtlpSink,
    SpanTracer,
    StepSpan,
    StepSpans,
    _Reason,
    _warned,
    start_tracing,
)
from headrace.wire import Plan, RowFlag


def traced(step: int, rows: list[tuple[int, int]], decode: bool = False) -> Plan:
    """A plan of some rows, of which those `(row, number of its span)` are traced."""
    plan = first_plan()
    count = max(row for row, _ in rows) + 1
    flags = RowFlag.SAMPLE | (RowFlag.FROM_SLOT if decode else 0)
    contexts = b"".join(
        bytes([7] * 16) + number.to_bytes(8, "big") + bytes([1]) for _, number in rows
    )
    for name, value in {
        "step": step,
        "row_slot_S": np.arange(count, dtype=np.int32),
        "row_len_S": np.full(count, 1 if decode else 5, np.int32),
        "row_flags_S": np.full(count, flags, np.int32),
        "trace_row": i32(*(row for row, _ in rows)),
        "trace_context": contexts,
    }.items():
        object.__setattr__(plan, name, value)
    return plan


def parent(span: StepSpan) -> int:
    return int.from_bytes(span.parent.span_id, "big")


def test_each_chunk_is_a_span_linked_to_its_neighbours():
    spans = StepSpans(rank=2).add(traced(9, [(0, 11), (2, 12)]), 1000, 2_501_000)
    assert [(span.name, parent(span)) for span in spans] == [
        ("shard.prefill", 11),
        ("shard.prefill", 12),
    ]
    assert spans[0].attributes == {
        "headrace.rank": 2,
        "headrace.step": 9,
        "headrace.prefill.tokens": 5,
        "batch_size": 3,
        "headrace.device_ms": 2.5,
    }
    assert (spans[0].begin_ns, spans[0].end_ns) == (1000, 2_501_000)
    assert [int.from_bytes(link.span_id, "big") for link in spans[0].links] == [12]


def test_decode_rows_of_a_sequence_are_one_span():
    made = StepSpans(rank=0)
    for step in range(3):
        begin = 1_000_000 * step
        rows = [(0, 21), (1, 22)] if step else [(0, 21)]
        assert made.add(traced(step, rows, decode=True), begin, begin + 500_000) == []
    assert made.take(before_ns=2_500_000) == [], "the last of them ended then"
    first, second = made.take()
    assert (parent(first), first.begin_ns, first.end_ns) == (21, 0, 2_500_000)
    assert first.attributes["headrace.decode.steps"] == 3
    assert first.attributes["headrace.device_ms"] == 1.5
    assert second.attributes["headrace.step"] == 1
    assert [link.span_id for link in second.links] == [first.parent.span_id]
    assert made.take() == [], "each is told once"


def test_links_are_bounded():
    made = StepSpans(rank=0)
    rows = [(row, row + 1) for row in range(LINKS_MAX + 5)]
    assert len(made.add(traced(0, rows), 0, 1)[0].links) == LINKS_MAX
    made.add(traced(1, rows, decode=True), 1, 2)
    assert len(made.take()[0].links) == LINKS_MAX


class Caught:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[StepSpan] = []
        self.closed = False

    def emit(self, span: StepSpan) -> None:
        self.spans.append(span)

    def close(self) -> None:
        self.closed = True


def test_the_thread_tells_what_is_open_when_it_stops():
    sink = Caught()
    tracer = SpanTracer(0, sink, idle_s=3600.0)
    tracer.step(traced(0, [(0, 1)]), 10, 20)
    tracer.step(traced(1, [(0, 2)], decode=True), 20, 30)
    tracer.stop()
    assert [span.name for span in sink.spans] == ["shard.prefill", "shard.decode"]
    assert sink.closed
    assert sink.spans[1].begin_ns - sink.spans[0].begin_ns == 10


def test_a_plan_that_nobody_traces_wakes_no_thread(monkeypatch: pytest.MonkeyPatch):
    woken: list[Any] = []
    tracer = SpanTracer(0, Caught(), idle_s=60.0)
    monkeypatch.setattr(tracer._steps, "put_nowait", woken.append)
    tracer.step(first_plan(), 0, 1)
    assert not woken
    tracer.step(traced(1, [(0, 11)]), 0, 1)
    assert len(woken) == 1
    tracer.stop()


def test_a_step_that_finds_the_queue_full_is_dropped_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
):
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Caught):
        def emit(self, span: StepSpan) -> None:
            begun.set()
            go_on.wait()

    tracer = SpanTracer(0, Slow())
    plan = traced(0, [(0, 1)])
    tracer.step(plan, 0, 1)
    begun.wait()
    with caplog.at_level(logging.WARNING):
        for _ in range(STEPS_MAX + 3):
            tracer.step(plan, 0, 1)
    assert tracer.dropped == 3
    assert len(caplog.records) == 1 and str(STEPS_MAX) in caplog.text
    go_on.set()
    tracer.stop()


def serve(**telemetry: Any) -> Serve:
    parsed = Serve.parse(example())
    return replace(parsed, telemetry=replace(parsed.telemetry, **telemetry))


def test_without_an_endpoint_or_a_sampler_nothing_is_imported():
    def fail(*_: object) -> Caught:
        raise AssertionError("nothing is to be made")

    assert isinstance(start_tracing(serve(otlp_endpoint=None), 0, fail), NoTracer)
    on = serve(otlp_endpoint="http://127.0.0.1:1")
    off = replace(on.telemetry, traces=replace(on.telemetry.traces, sampler="always_off"))
    assert isinstance(start_tracing(replace(on, telemetry=off), 0, fail), NoTracer)


def test_without_the_sdk_a_shard_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    with caplog.at_level(logging.WARNING):
        tracer = start_tracing(serve(otlp_endpoint="http://127.0.0.1:1"), 0)
    assert isinstance(tracer, NoTracer)
    assert len(caplog.records) == 1 and "opentelemetry-sdk" in caplog.text


# Certificates of tests; make.sh beside them says whose they are.
FILES = Path(__file__).parents[2] / "router" / "otlp" / "testdata"
OURS = ClientCertificate(FILES / "client.pem", FILES / "client.key")

Take = Callable[[bytes], None]


@contextmanager
def by_grpc(take: Take) -> Iterator[str]:
    """A collector that asks for a certificate; its endpoint."""

    def export(request: bytes, _: grpc.ServicerContext) -> bytes:
        take(request)
        return b""

    handler = grpc.method_handlers_generic_handler(
        "opentelemetry.proto.collector.trace.v1.TraceService",
        {"Export": grpc.unary_unary_rpc_method_handler(export)},
    )
    server = grpc.server(ThreadPoolExecutor(1), [handler])
    pair = ((FILES / "server.key").read_bytes(), (FILES / "server.pem").read_bytes())
    roots = (FILES / "ca.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"https://127.0.0.1:{port}"
    server.stop(None)


@contextmanager
def by_http(take: Take) -> Iterator[str]:
    """The same, by HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(FILES / "server.pem", FILES / "server.key")
    context.load_verify_locations(FILES / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{server.server_port}/v1/traces"
    server.shutdown()
    thread.join()
    server.server_close()


COLLECTORS = pytest.mark.parametrize(
    ("protocol", "collector"), [("grpc", by_grpc), ("http/protobuf", by_http)]
)


def secured(protocol: str, endpoint: str, tls: Tls) -> OtlpSink:
    telemetry = serve(otlp_endpoint=endpoint).telemetry
    # The exporter says what went wrong only where it has the time to try again, after a second.
    traces = replace(telemetry.traces, protocol=protocol, tls=tls, timeout_ms=3000)
    return OtlpSink(replace(telemetry, traces=traces), 0)


def made() -> StepSpan:
    return StepSpans(rank=0).add(traced(0, [(0, 1)]), 10, 20)[0]


@COLLECTORS
def test_spans_travel_by_tls_and_show_our_certificate(
    protocol: str, collector: Any, monkeypatch: pytest.MonkeyPatch
):
    # What serve.json names counts, whatever libraries find in the environment.
    for name in ("REQUESTS_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"):
        monkeypatch.setenv(name, str(FILES / "other.pem"))
    taken: queue.Queue[bytes] = queue.Queue()
    with collector(taken.put) as endpoint:
        sink = secured(protocol, endpoint, Tls(FILES / "ca.pem", OURS))
        sink.emit(made())
        sink.close()
        assert b"shard.prefill" in taken.get(timeout=30)


@COLLECTORS
def test_a_collector_that_nobody_vouches_for_gets_none_and_the_reason_is_told(
    protocol: str, collector: Any, caplog: pytest.LogCaptureFixture
):
    taken: queue.Queue[bytes] = queue.Queue()
    with collector(taken.put) as endpoint, caplog.at_level(logging.WARNING):
        sink = secured(protocol, endpoint, Tls(FILES / "other.pem", OURS))
        sink.emit(made())
        sink._provider.force_flush()
        sink.close()
    assert taken.empty()
    assert [record.name for record in caplog.records] == ["headrace.tracing"]
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


def test_a_collector_that_is_away_is_told_of_once_until_it_is_back(
    caplog: pytest.LogCaptureFixture,
):
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    reason = _Reason()
    outcomes = iter(["away", "still away", "", "away again"])

    class Fake(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            why = next(outcomes)
            for text in (why, "retries are over"):
                reason.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": text}))
            return SpanExportResult.FAILURE if why else SpanExportResult.SUCCESS

    exporter = _warned(Fake(), reason)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            exporter.export([])
    assert [record.args for record in caplog.records] == [("away",), ("away again",)]

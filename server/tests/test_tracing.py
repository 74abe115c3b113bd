"""Executed plans to spans, without a collector; and what a machine without the SDK does."""

import builtins
import logging
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_batch import first_plan, i32
from test_config import example

from headrace.config import Serve
from headrace.telemetry import NoTracer
from headrace.tracing import (
    LINKS_MAX,
    STEPS_MAX,
    SpanTracer,
    StepSpan,
    StepSpans,
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

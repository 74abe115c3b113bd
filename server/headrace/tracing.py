"""Spans of what a shard executes: children of the spans that a plan's rows name.

A chunk of a prompt is a span. The rows that take a sequence's last token are one span together,
which ends when none has come for a while: a span a token would cost more than the token's own
host work. All of it happens in a thread of its own; the executor leaves a plan and goes on.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.config import Serve, Telemetry, Tls
from headrace.telemetry import NoTracer, TraceContext, Tracer, trace_contexts
from headrace.wire import Plan, RowFlag

log = logging.getLogger(__name__)

# Executed plans that may wait to become spans; more are dropped.
STEPS_MAX = 1024

# A sequence whose rows have not come for so long has its span of decode steps closed.
IDLE_S = 1.0

# What the collector has to take the last spans when the process ends.
FLUSH_S = 2.0

# A row that takes its slot's last token; a plain number, because there is one a token.
FROM_SLOT = int(RowFlag.FROM_SLOT)

# Other sequences of its steps that a span is linked to.
LINKS_MAX = 32


@dataclass(frozen=True)
class StepSpan:
    """A span before it is one: times in ns since 1970, `parent` and `links` as rows name them."""

    name: str
    parent: TraceContext
    begin_ns: int
    end_ns: int
    attributes: dict[str, int | float | str]
    links: list[TraceContext]


class SpanSink(Protocol):
    """Where spans go."""

    def emit(self, span: StepSpan) -> None: ...

    def close(self) -> None:
        """Sends what waits, for `FLUSH_S` at most."""
        ...


@dataclass
class _Decode:
    """The decode rows of one sequence so far."""

    parent: TraceContext
    begin_ns: int
    end_ns: int
    first_step: int
    steps: int = 0
    rows_max: int = 0
    device_us: int = 0
    links: dict[bytes, TraceContext] = field(default_factory=dict)


class StepSpans:
    """Executed plans to spans: values in, values out; no clock, no thread."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._decodes: dict[bytes, _Decode] = {}

    def add(self, plan: Plan, begin_ns: int, end_ns: int) -> list[StepSpan]:
        """Takes a plan that ran, times in ns since 1970; returns the spans of its chunks."""
        contexts = trace_contexts(plan)
        flags: list[int] = plan.row_flags_S.tolist()
        spans: list[StepSpan] = []
        for context in contexts:
            if flags[context.row] & FROM_SLOT:
                self._decoded(plan, context, contexts, begin_ns, end_ns)
                continue
            attributes: dict[str, int | float | str] = {
                "headrace.rank": self._rank,
                "headrace.step": plan.step,
                "headrace.prefill.tokens": int(plan.row_len_S[context.row]),
                "batch_size": len(plan.row_slot_S),
                "headrace.device_ms": (end_ns - begin_ns) / 1e6,
            }
            others = [other for other in contexts if other is not context][:LINKS_MAX]
            spans.append(StepSpan("shard.prefill", context, begin_ns, end_ns, attributes, others))
        return spans

    def take(self, before_ns: int | None = None) -> list[StepSpan]:
        """The spans of decode rows of which the last ended before a time; None: all of them."""
        ended = [
            key
            for key, decode in self._decodes.items()
            if before_ns is None or decode.end_ns < before_ns
        ]
        return [self._span(self._decodes.pop(key)) for key in ended]

    def _decoded(
        self,
        plan: Plan,
        context: TraceContext,
        contexts: list[TraceContext],
        begin_ns: int,
        end_ns: int,
    ) -> None:
        decode = self._decodes.get(context.span_id)
        if decode is None:
            decode = _Decode(context, begin_ns, end_ns, plan.step)
            self._decodes[context.span_id] = decode
        decode.end_ns = max(decode.end_ns, end_ns)
        decode.steps += 1
        decode.rows_max = max(decode.rows_max, len(plan.row_slot_S))
        decode.device_us += (end_ns - begin_ns) // 1000
        for other in contexts if len(decode.links) < LINKS_MAX else ():
            if other is not context and len(decode.links) < LINKS_MAX:
                decode.links.setdefault(other.span_id, other)

    def _span(self, decode: _Decode) -> StepSpan:
        attributes: dict[str, int | float | str] = {
            "headrace.rank": self._rank,
            "headrace.step": decode.first_step,
            "headrace.decode.steps": decode.steps,
            "batch_size": decode.rows_max,
            "headrace.device_ms": decode.device_us / 1e3,
        }
        links = list(decode.links.values())
        return StepSpan(
            "shard.decode", decode.parent, decode.begin_ns, decode.end_ns, attributes, links
        )


class SpanTracer:
    """Makes spans of executed steps, in a thread. Its `step` never waits."""

    def __init__(self, rank: int, sink: SpanSink, idle_s: float = IDLE_S) -> None:
        self._spans = StepSpans(rank)
        self._sink = sink
        self._idle_s = idle_s
        # The executor's clock begins anywhere.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self._steps: queue.Queue[tuple[Plan, int, int] | None] = queue.Queue(STEPS_MAX)
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        self._thread.start()

    def step(self, plan: Plan, begin_ns: int, end_ns: int) -> None:
        if not plan.trace_context:
            return  # Waking the thread would cost what nobody asked for.
        try:
            self._steps.put_nowait((plan, begin_ns, end_ns))
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                log.warning("spans are dropped: more than %d steps wait to become some", STEPS_MAX)

    def stop(self) -> None:
        with contextlib.suppress(queue.Full):
            self._steps.put(None, timeout=FLUSH_S)
        self._thread.join(FLUSH_S)
        self._sink.close()

    def _run(self) -> None:
        swept = time.monotonic()
        while True:
            item: tuple[Plan, int, int] | None = None
            with contextlib.suppress(queue.Empty):
                item = self._steps.get(timeout=self._idle_s)
                if item is None:
                    self._emit(self._spans.take())
                    return
                plan, begin_ns, end_ns = item
                begin_ns, end_ns = begin_ns + self._epoch_ns, end_ns + self._epoch_ns
                self._emit(self._spans.add(plan, begin_ns, end_ns))
            if time.monotonic() - swept >= self._idle_s:
                swept = time.monotonic()
                self._emit(self._spans.take(time.time_ns() - int(1e9 * self._idle_s)))

    def _emit(self, spans: list[StepSpan]) -> None:
        for span in spans:
            self._sink.emit(span)


class OtlpSink:
    """Spans to the collector, by OpenTelemetry's SDK.

    Raises `ImportError` where the SDK or the exporter is not installed.
    """

    def __init__(self, telemetry: Telemetry, rank: int) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        # It warns of each batch that fails; we warn of the first, with what it says then.
        reason = _Reason()
        logger = logging.getLogger("opentelemetry")
        logger.handlers, logger.propagate = [reason], False
        traces = telemetry.traces
        resource = {pair.name: pair.value for pair in traces.resource} | {
            "service.name": telemetry.otlp_service_name,
            "headrace.component": "shard",
            "headrace.rank": str(rank),
        }
        # The router has sampled; what comes here is wanted.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource(resource),
            span_limits=SpanLimits(max_links=LINKS_MAX),
            shutdown_on_exit=False,
        )
        processor = BatchSpanProcessor(
            _warned(_exporter(telemetry), reason),
            max_queue_size=traces.queue_max,
            schedule_delay_millis=traces.delay_ms,
            max_export_batch_size=traces.batch_max,
            export_timeout_millis=traces.timeout_ms,
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("headrace")
        self._api: Any = trace

    def emit(self, span: StepSpan) -> None:
        api = self._api
        parent = api.NonRecordingSpan(self._context(span.parent))
        links = [api.Link(self._context(link)) for link in span.links]
        made = self._tracer.start_span(
            span.name,
            context=api.set_span_in_context(parent),
            kind=api.SpanKind.INTERNAL,
            attributes=span.attributes,
            links=links,
            start_time=span.begin_ns,
        )
        made.end(span.end_ns)

    def close(self) -> None:
        # A collector that is away would be tried again for longer than may be waited.
        thread = threading.Thread(target=self._provider.shutdown, name="flush", daemon=True)
        thread.start()
        thread.join(FLUSH_S)

    def _context(self, context: TraceContext) -> Any:
        return self._api.SpanContext(
            trace_id=int.from_bytes(context.trace_id, "big"),
            span_id=int.from_bytes(context.span_id, "big"),
            is_remote=True,
            trace_flags=self._api.TraceFlags(context.flags),
        )


def start_tracing(
    serve: Serve, rank: int, sink: Callable[[Telemetry, int], SpanSink] = OtlpSink
) -> Tracer:
    """The tracer of a shard: none unless requests are sampled and the SDK is installed."""
    telemetry = serve.telemetry
    if telemetry.otlp_endpoint is None or telemetry.traces.sampler == "always_off":
        return NoTracer()
    try:
        return SpanTracer(rank, sink(telemetry, rank))
    except ImportError as error:
        log.warning(
            "traces have no spans of this shard: %s; install opentelemetry-sdk and "
            "opentelemetry-exporter-otlp-proto-grpc (or -http)",
            error,
        )
        return NoTracer()


def _exporter(telemetry: Telemetry) -> Any:
    traces = telemetry.traces
    seconds = traces.timeout_ms / 1000
    headers = {pair.name.lower(): pair.value for pair in traces.headers}
    if traces.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(
            endpoint=telemetry.otlp_endpoint,
            insecure=traces.tls is None,
            credentials=traces.tls and _credentials(traces.tls),
            headers=headers,
            timeout=seconds,
        )
    import requests
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as OverHttp

    # It would take roots, passwords and proxies from the environment, before those that we name.
    session = requests.Session()
    session.trust_env = False
    own = traces.tls.client if traces.tls else None
    return OverHttp(
        endpoint=telemetry.otlp_endpoint,
        certificate_file=str(traces.tls.roots) if traces.tls else None,
        client_certificate_file=str(own.certificate) if own else None,
        client_key_file=str(own.key) if own else None,
        headers=headers,
        timeout=seconds,
        session=session,
    )


def _credentials(tls: Tls) -> Any:
    """TLS of gRPC; raises `OSError` where a file is gone."""
    import grpc

    own = tls.client
    return grpc.ssl_channel_credentials(
        root_certificates=tls.roots.read_bytes(),
        private_key=own.key.read_bytes() if own else None,
        certificate_chain=own.certificate.read_bytes() if own else None,
    )


class _Reason(logging.Handler):
    """Keeps the first warning of a batch, which says why it did not arrive; later ones need not."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and not self.text:
            self.text = record.getMessage()


def _warned(inner: Any, reason: _Reason) -> Any:
    """The same exporter, which says once that spans do not arrive, and why."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Warned(SpanExporter):
        is_away = False

        def export(self, spans: Any) -> Any:
            reason.text = ""
            result = inner.export(spans)
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self.is_away:
                log.warning(
                    "the collector takes no spans; they are dropped until it does: %s", reason.text
                )
            self.is_away = failed
            return result

        def shutdown(self) -> None:
            inner.shutdown()

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return inner.force_flush(timeout_millis)

    return Warned()

"""Logs that never block the device, and what an executor tells of steps that are traced."""

import json
import logging
import logging.handlers
import queue
import sys
from dataclasses import dataclass
from typing import Protocol

from headrace.config import Telemetry
from headrace.wire import TRACE_CONTEXT_BYTES, Plan

# Lines that may wait for a slow reader of stderr; more are dropped and counted.
LOG_QUEUE_MAX = 1024


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The caller's span of one row, as in W3C traceparent."""

    row: int
    trace_id: bytes  # 16
    span_id: bytes  # 8
    flags: int


class Tracer(Protocol):
    """Makes spans of executed steps."""

    def step(self, plan: Plan, begin_ns: int, end_ns: int) -> None:
        """Tells that a plan ran, by the clock of `time.perf_counter_ns`; called only for plans
        that carry trace contexts. Never waits."""
        ...

    def stop(self) -> None:
        """Sends what waits, within a bounded time."""
        ...


class NoTracer:
    """Drops what it is told."""

    def step(self, plan: Plan, begin_ns: int, end_ns: int) -> None:
        del plan, begin_ns, end_ns

    def stop(self) -> None:
        pass


def trace_contexts(plan: Plan) -> list[TraceContext]:
    """Reads the trace columns of a plan."""
    contexts: list[TraceContext] = []
    for i, row in enumerate(plan.trace_row.tolist()):
        entry = plan.trace_context[i * TRACE_CONTEXT_BYTES : (i + 1) * TRACE_CONTEXT_BYTES]
        contexts.append(TraceContext(row, entry[:16], entry[16:24], entry[24]))
    return contexts


class _DroppingHandler(logging.handlers.QueueHandler):
    """Queues records; when the queue is full it drops, and says how many once it is not."""

    def __init__(self, records: "queue.Queue[logging.LogRecord]") -> None:
        super().__init__(records)
        self._records = records
        self._dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                lost = f"{self._dropped} log lines were dropped: stderr is not read fast enough"
                self._records.put_nowait(
                    logging.LogRecord(__name__, logging.WARNING, __file__, 0, lost, None, None)
                )
                self._dropped = 0
            self._records.put_nowait(record)
        except queue.Full:
            self._dropped += 1


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, with the router's field names."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": self.formatTime(record, "%Y-%m-%dT%H:%M:%S"),
            "level": record.levelname,
            "fields": {"message": record.getMessage()},
            "target": record.name,
        }
        return json.dumps(line)


def start_logging(telemetry: Telemetry, rank: int) -> logging.handlers.QueueListener:
    """Sends logs of this process to stderr from a thread of its own; `stop()` flushes them."""
    handler = logging.StreamHandler(sys.stderr)
    text = f"%(asctime)s %(levelname)s shard {rank}: %(message)s"
    handler.setFormatter(_JsonFormatter() if telemetry.json_output else logging.Formatter(text))
    records: queue.Queue[logging.LogRecord] = queue.Queue(LOG_QUEUE_MAX)
    listener = logging.handlers.QueueListener(records, handler)
    listener.start()
    root = logging.getLogger()
    root.handlers[:] = [_DroppingHandler(records)]
    root.setLevel(_level(telemetry.log_level))
    return listener


def _level(filter_text: str) -> int:
    """The level of a router's filter: its first directive that names no target."""
    names = {"error": "ERROR", "warn": "WARNING", "info": "INFO", "debug": "DEBUG"}
    for directive in filter_text.lower().split(","):
        if directive.strip() == "trace":
            return logging.DEBUG
        if directive.strip() in names:
            return logging.getLevelNamesMapping()[names[directive.strip()]]
    return logging.INFO

"""A real OpenTelemetry collector (rotel), which hands on what it takes for tests to read."""

import contextlib
import gzip
import importlib.util
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stack import free_port

WAIT_SECONDS_MAX = 30.0
# Certificates of tests; make.sh beside them says whose they are.
CERTIFICATES = Path(__file__).parents[1] / "router" / "otlp" / "testdata"


class Collector:
    """A running collector. A context manager: leaves no process behind."""

    def __init__(self) -> None:
        self.grpc, self.http = free_port(), free_port()
        self._changed = threading.Condition()
        self._spans: list[dict[str, Any]] = []
        self._back = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._back.serve_forever, daemon=True).start()
        found = importlib.util.find_spec("rotel")
        assert found and found.origin, "rotel is a package of the tests"
        self._process = subprocess.Popen(
            [
                str(Path(found.origin).parent / "rotel-agent"),
                "start",
                *("--otlp-grpc-endpoint", f"127.0.0.1:{self.grpc}"),
                *("--otlp-http-endpoint", f"127.0.0.1:{self.http}"),
                *("--exporter", "otlp", "--otlp-exporter-protocol", "http"),
                *("--otlp-exporter-endpoint", f"http://127.0.0.1:{self._back.server_port}"),
                "--disable-batching",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for port in (self.grpc, self.http):
            self._wait_for(port)

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._back.shutdown()
        self._back.server_close()

    def spans(self, *names: str, trace: str | None = None) -> list[dict[str, Any]]:
        """The spans so far, of one trace or of all, once these names are among them."""
        give_up = time.monotonic() + WAIT_SECONDS_MAX
        with self._changed:
            while True:
                found = [span for span in self._spans if trace in {None, span["trace"]}]
                missing = set(names) - {span["name"] for span in found}
                if not missing:
                    return found
                left = give_up - time.monotonic()
                assert left > 0, f"no span is called {missing}; there are {found}"
                self._changed.wait(left)

    def _wait_for(self, port: int) -> None:
        give_up = time.monotonic() + WAIT_SECONDS_MAX
        while True:
            assert self._process.poll() is None, "the collector ended"
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except OSError:
                assert time.monotonic() < give_up, "the collector does not listen"
                time.sleep(0.02)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                outer._take(body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler

    def _take(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        request = ExportTraceServiceRequest.FromString(body)
        spans = [
            {
                "name": span.name,
                "trace": span.trace_id.hex(),
                "id": span.span_id.hex(),
                "parent": span.parent_span_id.hex(),
                "state": span.trace_state,
                "begin": span.start_time_unix_nano,
                "end": span.end_time_unix_nano,
                "links": [link.span_id.hex() for link in span.links],
                "resource": _values(group.resource.attributes),
                "attributes": _values(span.attributes),
            }
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._changed:
            self._spans += spans
            self._changed.notify_all()


class Front:
    """TLS for gRPC in front of a port, as a hosted collector has it; asks for a certificate.

    A context manager. `certificate` is the name of the one that the next connections are shown.
    """

    def __init__(self, port: int, certificate: str) -> None:
        self.certificate = certificate
        self._behind = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Front":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pem = CERTIFICATES / f"{self.certificate}.pem"
        context.load_cert_chain(pem, pem.with_suffix(".key"))
        context.load_verify_locations(CERTIFICATES / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["h2"])
        with (
            contextlib.suppress(OSError),
            context.wrap_socket(client, server_side=True) as outer,
            socket.create_connection(("127.0.0.1", self._behind)) as inner,
        ):
            back = threading.Thread(target=_copy, args=(inner, outer), daemon=True)
            back.start()
            _copy(outer, inner)
            back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """What one end says, to the other, until it ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def _values(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)

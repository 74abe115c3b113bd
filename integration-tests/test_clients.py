"""Other people's programs against the whole server, each in an environment of its own.

`tools/test_clients.sh` makes the environments and runs this; it is no part of `make test`.
"""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from programs import ENVIRONMENTS, run, run_alone
from stack import Stack

pytestmark = pytest.mark.clients

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "clients"
# A tiny context keeps answers without `max_tokens` short; few permits make overload easy to see.
FLAGS = ("--dtype", "float32", "--threads", "1", "--max-total-tokens", "96")
POOL = ("--kv-memory", "4000000", "--max-concurrent-requests", "4")
# Fewer cases than this mean that the document lost routes or the fuzzer its way.
CASES_MIN = 2000
WIDTHS = {"int32", "int64", "float", "double"}


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Stack]:
    with Stack("--model-id", str(tiny_model), *FLAGS, *POOL) as stack:
        yield stack.wait_ready()


PROMISES = [
    (
        "tgi",
        "client_tgi.py",
        "generate full_text stream sampled stop_sequence chat errors concurrent",
    ),
    (
        "openai",
        "client_openai.py",
        "models chat chat_stream chat_logprobs chat_stop chat_several chat_leaves_early chat_bias "
        "completions completions_stream completions_logprobs errors",
    ),
    (
        "openai",
        "client_strict.py",
        "models chat chat_stream stopped completions completions_stream echo",
    ),
    (
        "openai",
        "client_hub.py",
        "endpoint text_generation text_stream text_sampled chat grammar errors concurrent",
    ),
    (
        "hub034",
        "client_hub.py",
        "endpoint text_generation text_stream text_sampled chat grammar errors concurrent",
    ),
    ("langchain", "client_langchain.py", "invoke stream stop chat"),
]
NODE_PROMISES = [
    ("client_inference.mjs", "text_generation text_stream chat chat_stream errors"),
    ("client_openai.mjs", "models chat chat_stream chat_leaves_early completions errors"),
]


@pytest.mark.parametrize(
    ("environment", "script", "promises"), PROMISES, ids=["-".join(row[:2]) for row in PROMISES]
)
def test_client_works_unchanged(
    served: Stack, environment: str, script: str, promises: str
) -> None:
    url = f"http://127.0.0.1:{served.port}"
    output = run(environment, "python", str(SCRIPTS / script), url)
    assert output.split("\n")[:-1] == [f"ok {promise}" for promise in promises.split()]


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
@pytest.mark.parametrize(("script", "promises"), NODE_PROMISES, ids=[r[0] for r in NODE_PROMISES])
def test_client_of_node_works_unchanged(served: Stack, script: str, promises: str) -> None:
    node = shutil.which("node")
    folder = ENVIRONMENTS / "node"
    assert node and folder.is_dir(), f"{folder} is missing: run `make test-clients`"
    output = run_alone(Path(node), str(folder / script), f"http://127.0.0.1:{served.port}")
    assert output.split("\n")[:-1] == [f"ok {promise}" for promise in promises.split()]


def test_manifests_are_what_kubernetes_understands() -> None:
    manifests = sorted(str(path) for path in (ROOT / "docs" / "kubernetes").glob("*.yaml"))
    output = run("kubernetes", "kubernetes-validate", "--strict", *manifests)
    kinds = re.findall(r"passed for resource (\w+)/", output)
    assert sorted(kinds) == ["deployment", "persistentvolumeclaim", "service"]


class Transcripts(BaseHTTPRequestHandler):
    """Answers any chat with the calls that the router's own tests wrote down."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, name = "application/json", "tools.json"
        if body.get("stream"):
            kind, name = "text/event-stream", "tools.sse"
        text = (ROOT / "router" / "src" / "tests" / "golden" / name).read_text()
        # The transcripts have letters for what differs from run to run.
        answer = text.replace('"created":N', '"created":1').encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def test_clients_read_calls_of_tools() -> None:
    server = HTTPServer(("127.0.0.1", 0), Transcripts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        output = run("openai", "python", str(SCRIPTS / "client_tools.py"), url)
    finally:
        server.shutdown()
        server.server_close()
    promises = "openai_whole openai_streamed strict_types hub_whole hub_streamed"
    assert output.split("\n")[:-1] == [f"ok {promise}" for promise in promises.split()]


def without_widths(schema: Any) -> Any:
    """A schema without the widths of its numbers: JSON has none, and wider ones are served too."""
    if isinstance(schema, list):
        return [without_widths(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    hint = "format" if schema.get("format") in WIDTHS else None
    return {key: without_widths(part) for key, part in schema.items() if key != hint}


def without_deadlines(document: Any) -> Any:
    """A description without the header that bounds a request's time: whoever asks for no time gets
    504, which is right, and which schemathesis takes for a fault of the server."""
    for path in document["paths"].values():
        for operation in path.values():
            parameters = operation.get("parameters", [])
            operation["parameters"] = [p for p in parameters if p["name"] != "x-request-timeout"]
    return document


def test_schemathesis_finds_nothing_the_document_does_not_say(
    served: Stack, tmp_path: Path
) -> None:
    document = tmp_path / "openapi.json"
    described = json.loads(served.get("/api-doc/openapi.json")[1])
    document.write_text(json.dumps(without_deadlines(without_widths(described))))
    url = f"http://127.0.0.1:{served.port}"
    report = ("--report", "junit", "--report-junit-path", str(tmp_path / "report.xml"))
    output = run(
        *("schemathesis", "st", "--config-file", str(SCRIPTS / "schemathesis.toml"), "run"),
        *(str(document), "--url", url, *report),
    )
    counted = re.search(r"(\d+) generated, (\d+) passed", output)
    assert counted, output
    assert counted[1] == counted[2]
    assert int(counted[1]) >= CASES_MIN, output


def test_server_is_unharmed_by_all_that(served: Stack) -> None:
    assert served.get("/health")[0] == 200
    assert served.metric("headrace_kv_blocks_free") == served.metric("headrace_kv_blocks") > 0
    assert served.metric("tgi_batch_current_size") == 0
    assert "panicked" not in served.log

"""The real launcher, router and shards as a process tree, and a client that sees raw bytes."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADRACE = Path(os.environ.get("HEADRACE") or Path(sys.executable).parent / "headrace")
# A pool of a few hundred blocks: nothing here needs the default, which is touched at once.
FLAGS = ("--device", "cpu", "--dtype", "float32", "--threads", "1", "--kv-memory", "16000000")
READY_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 60.0


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Stack:
    """One running server. A context manager: leaves no process behind."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.port = free_port()
        self.log_path = Path(tempfile.mkstemp(prefix="headrace-", suffix=".log")[1])
        argv = [str(HEADRACE), "--hostname", "127.0.0.1", "--port", str(self.port), *flags]
        env = {k: v for k, v in os.environ.items() if k not in {"PORT", "HOSTNAME", "MODEL_ID"}}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=subprocess.STDOUT, env=env | environment
            )

    def __enter__(self) -> "Stack":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log_path.unlink(missing_ok=True)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> "Stack":
        """Returns when /health says 200; fails with the log if the server ends before."""
        give_up = time.monotonic() + READY_SECONDS_MAX
        while time.monotonic() < give_up:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}\n{self.log}")
            try:
                if self.get("/health")[0] == 200:
                    return self
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {READY_SECONDS_MAX} s\n{self.log}")

    def wait_exit(self, seconds: float = STOP_SECONDS_MAX) -> int:
        return self.process.wait(seconds)

    def connect(self, timeout: float = 120.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str) -> tuple[int, str]:
        connection = self.connect(10.0)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read().decode()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **more: str) -> tuple[int, Any, dict[str, str]]:
        """Status, decoded JSON (or text), headers. `more` are headers, `_` in the place of `-`."""
        connection = self.connect()
        try:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent = {"Content-Type": "application/json"}
            sent |= {name.replace("_", "-"): value for name, value in more.items()}
            connection.request("POST", path, data, sent)
            reply = connection.getresponse()
            text = reply.read().decode()
            headers = {k.lower(): v for k, v in reply.getheaders()}
            is_json = headers.get("content-type", "").startswith("application/json")
            return reply.status, json.loads(text) if is_json and text else text, headers
        finally:
            connection.close()

    def ok(self, path: str, body: Any) -> Any:
        status, answer, _ = self.post(path, body)
        assert status == 200, (status, answer)
        return answer

    def stream(self, path: str, body: Any) -> Iterator[Any]:
        """Decoded `data:` payloads of an SSE answer; `[DONE]` as that string."""
        connection = self.connect()
        try:
            data = json.dumps(body).encode()
            connection.request("POST", path, data, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert reply.status == 200, (reply.status, reply.read())
            assert reply.getheader("content-type", "").startswith("text/event-stream")
            for line in reply:
                if line.startswith(b"data: "):
                    payload = line[6:].strip()
                    yield "[DONE]" if payload == b"[DONE]" else json.loads(payload)
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series of /metrics; 0 when it is absent."""
        for line in self.get("/metrics")[1].splitlines():
            series, _, value = line.rpartition(" ")
            base, _, rest = series.partition("{")
            if base == name and all(f'{k}="{v}"' in rest for k, v in labels.items()):
                return float(value)
        return 0.0

    def children(self) -> list[int]:
        """Every process below the launcher."""
        return descendants(self.process.pid)


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, read from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"

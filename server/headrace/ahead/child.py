"""The process that compiles kernels while a shard reads weights: started, awaited, outlived.

Its standard input tells it what to compile and is its lifeline; its standard output is one line
that says what became of it. Whatever goes wrong with it, the shard compiles by itself.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

from headrace.ahead.stamp import Wanted, is_compiled
from headrace.config import Serve
from headrace.errors import ConfigError

log = logging.getLogger(__name__)

# How long a start waits for kernels that others compile before it compiles the rest itself.
WAIT_S = 120.0


class Ahead:
    """Kernels of one shard's start, on their way into the cache."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None
        self._why = ""  # why nothing is compiled ahead, where that is worth a line

    def after(self, thread: threading.Thread) -> None:
        """Names the thread that calls `begin`, if it finds a GPU."""
        self._thread = thread

    def begin(self, capability: tuple[int, int]) -> None:
        """Starts the process, unless the kernels of such a start are marked as compiled."""
        if self._serve.device.reference_ops or find_spec("triton") is None:
            return
        try:
            wanted = Wanted.of(self._serve, capability)
            if is_compiled(wanted.name()):
                return
            self._process = subprocess.Popen(
                [sys.executable, "-m", "headrace", "compile", "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert self._process.stdin is not None
            # The pipe stays open as long as this process lives.
            self._process.stdin.write(wanted.encode() + "\n")
            self._process.stdin.flush()
        except (ConfigError, OSError) as error:
            # A folder that is not a model is told by whoever loads it.
            self._why = f"{type(error).__name__}: {error}"

    def wait(self) -> None:
        """Returns when there is nothing more to wait for; what became of it goes to the log."""
        begin = time.monotonic()
        if self._thread is not None:
            self._thread.join(WAIT_S)
        process = self._process
        if process is None:
            if self._why:
                log.warning("no kernels were compiled ahead: %s", self._why)
            return
        assert process.stdin is not None and process.stdout is not None
        try:
            # Its line fits into the pipe; its lifeline must stay open.
            process.wait(max(0.0, WAIT_S - (time.monotonic() - begin)))
            told = process.stdout.read()
        except subprocess.TimeoutExpired:
            process.kill()
            told = json.dumps({"error": f"it takes more than {WAIT_S:.0f} s"})
        process.stdin.close()
        _tell(told, process.wait())


def _tell(told: str, status: int) -> None:
    """One line about the child's end."""
    try:
        result = json.loads(told)
    except ValueError:
        result = {"error": f"the process ended with status {status}"}
    if "error" in result:
        log.warning("kernels compile at their first launch: %s", result["error"])
    else:
        log.info("kernels compiled ahead: %s", result["done"])

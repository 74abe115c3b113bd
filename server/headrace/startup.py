"""Where the seconds of a start went. Imports nothing heavy: it is there before everything else."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# An age beyond this is a clock that cannot be trusted, not a slow interpreter.
_AGE_MAX_S = 60.0
# Bytes that are asked for at once; the kernel cuts them into requests of its own.
_AHEAD_BYTES = 64 << 20
# The driver's numbers of the two parts of a compute capability.
_CAPABILITY = 75, 76


class Phases:
    """A stopwatch with names. What runs inside an inner phase does not count for the outer one.

    For one thread at a time: whoever starts the server hands it on.
    """

    def __init__(self, age_s: float = 0.0) -> None:
        """
        Args:
            age_s: how long the process has been running.
        """
        self._began = time.monotonic() - age_s
        self._seconds: dict[str, float] = {}
        self._beside: dict[str, float] = {}
        self._inner: list[float] = []  # of each open phase: seconds of the phases inside it
        self._told = False
        if age_s > 0:
            self._seconds["interpreter"] = age_s

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures what runs within; a name that comes again adds up."""
        self._seconds.setdefault(name, 0.0)
        self._inner.append(0.0)
        begin = time.monotonic()
        try:
            yield
        finally:
            whole = time.monotonic() - begin
            self._seconds[name] += whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole

    def beside(self, name: str, seconds: float) -> None:
        """Notes what other threads did meanwhile; it is no part of the sum."""
        self._beside[name] = self._beside.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in the order in which they began."""
        return dict(self._seconds)

    def total(self) -> float:
        """Seconds since the process began."""
        return time.monotonic() - self._began

    def table(self) -> str:
        """A line a phase: name, seconds, share; then what nobody measured, and the sum."""
        total = self.total()
        rows = [*self._seconds.items()]
        rows.append(("elsewhere", max(0.0, total - sum(self._seconds.values()))))
        rows.append(("total", total))
        lines = [f"{name:<22} {s:7.2f} s {100 * s / max(total, 1e-9):4.0f} %" for name, s in rows]
        lines += [f"{name:<22} {s:7.2f} s  meanwhile" for name, s in self._beside.items()]
        return "\n".join(lines)

    def tell(self) -> list[str]:
        """The table's lines at the first call, nothing at any later one."""
        lines = [] if self._told else ["start to ready", *self.table().splitlines()]
        self._told = True
        return lines


def process_age() -> float:
    """Seconds since this process was started, or 0 where the system does not say."""
    try:
        # The name, in brackets, may hold anything; the fields after it are numbers.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
    return age if 0 < age < _AGE_MAX_S else 0.0


def read_ahead(folder: Path) -> threading.Thread | None:
    """Has the kernel fetch a folder's weights into its cache while Python imports its libraries.

    It does nothing for files that are there already, and no error of it matters: whoever reads
    the files will meet it again.
    """
    if not hasattr(os, "posix_fadvise"):
        return None

    def fetch() -> None:
        for path in sorted(folder.glob("model*.safetensors")):
            try:
                with path.open("rb", buffering=0) as file:
                    for at in range(0, path.stat().st_size, _AHEAD_BYTES):
                        os.posix_fadvise(file.fileno(), at, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            except OSError:
                return

    thread = threading.Thread(target=fetch, name="read-ahead", daemon=True)
    thread.start()
    return thread


def open_driver(
    index: int, found: Callable[[tuple[int, int]], None] | None = None
) -> threading.Thread:
    """Has the CUDA driver make a device's context while Python imports its libraries.

    PyTorch will share it: a device has one primary context a process. Where there is no driver,
    or it refuses, PyTorch will find out by itself and say so.

    Args:
        found: is told the device's compute capability, in the thread, if there is a device.
    """

    def retain() -> None:
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
            if found is not None:
                found(_capability(driver, device))
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    thread = threading.Thread(target=retain, name="driver", daemon=True)
    thread.start()
    return thread


def _capability(driver: Any, device: ctypes.c_int) -> tuple[int, int]:
    found = ctypes.c_int()
    numbers: list[int] = []
    for attribute in _CAPABILITY:
        driver.cuDeviceGetAttribute(ctypes.byref(found), attribute, device)
        numbers.append(found.value)
    major, minor = numbers
    return major, minor

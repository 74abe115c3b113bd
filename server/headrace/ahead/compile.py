"""Compiling variants into Triton's cache, in several processes side by side.

Workers are forked when everything is imported and recorded. Each takes the next variant from a
pipe and writes what became of it into another, so none waits for another, and one that dies costs
no more than the variant that it had.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.nvidia import driver as cuda
from triton.compiler import make_backend
from triton.runtime.cache import triton_key

from headrace.ahead.rehearsal import Variant, standing_in, target_of

# Processes at most: a start has about sixty kernels, and the longest of them bounds the whole.
WORKERS_MAX = 16

# Kernels that take longest, in the order in which they are begun.
LONGEST = ("draw_filtered_kernel", "alternatives_kernel", "draw_whole_kernel")

_INDEX = struct.Struct("<H")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Compiled:
    """What became of some variants."""

    kernels: int  # that are in the cache now
    missing: tuple[str, ...]  # one sentence each: what is not, and why
    cpu_s: float  # of all workers
    slowest: tuple[tuple[str, float], ...]  # kernels and their seconds, longest first


@dataclass(frozen=True)
class _Job:
    """A variant, and what else is built beside it."""

    variant: Variant
    launcher: bool  # the host code that launches it
    utils: bool  # what every launch needs


def compile_variants(
    variants: list[Variant], capability: tuple[int, int], workers: int
) -> Compiled:
    """Compiles in forked processes; returns when all are done.

    Args:
        workers: processes; at most `WORKERS_MAX` and one a variant are started.
    """
    jobs = _jobs(variants)
    taken_read, taken_write = os.pipe()
    told_read, told_write = os.pipe()
    with os.fdopen(taken_write, "wb") as file:
        file.writelines(_INDEX.pack(index) for index in range(len(jobs)))
    parent = os.getpid()
    children: list[int] = []
    with linkable(), standing_in(capability):
        # What every compilation hashes is hashed once.
        triton_key()
        make_backend(target_of(capability)).hash()
        for _ in range(max(1, min(workers, WORKERS_MAX, len(jobs)))):
            child = os.fork()
            if child == 0:
                _work(jobs, taken_read, told_write, parent)
            children.append(child)
        os.close(taken_read)
        os.close(told_write)
        with os.fdopen(told_read, encoding="utf-8") as told:
            results = {result["index"]: result for result in map(json.loads, told)}
        for child in children:
            os.waitpid(child, 0)
    return _summary(jobs, results)


def _jobs(variants: list[Variant]) -> list[_Job]:
    """The longest first, so that none of them is begun when the others are done."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    ordered = sorted(variants, key=lambda variant: rank.get(variant.name, len(rank)))
    # Variants whose launchers are the same build it once: the last of them.
    last = {variant.launcher: index for index, variant in enumerate(ordered)}
    return [
        _Job(variant, launcher=last[variant.launcher] == index, utils=index == len(ordered) - 1)
        for index, variant in enumerate(ordered)
    ]


def _summary(jobs: list[_Job], results: dict[int, dict[str, Any]]) -> Compiled:
    missing: list[str] = []
    for index, job in enumerate(jobs):
        why = results.get(index, {"error": "its process died"}).get("error")
        if why:
            missing.append(f"{job.variant.name}: {why}")
    seconds = [(jobs[index].variant.name, result["seconds"]) for index, result in results.items()]
    return Compiled(
        kernels=len(jobs) - len(missing),
        missing=tuple(missing),
        cpu_s=sum(result["cpu"] for result in results.values()),
        slowest=tuple(sorted(seconds, key=lambda pair: -pair[1])),
    )


def _work(jobs: list[_Job], taken: int, told: int, parent: int) -> None:
    """A worker's life. Ends the process."""
    # Nobody waits for a worker whose parent is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    try:
        while os.getppid() == parent and (data := os.read(taken, _INDEX.size)):
            (index,) = _INDEX.unpack(data)
            result = {"index": index} | _result(jobs[index])
            # Less than a pipe takes at once: lines of workers do not mix.
            os.write(told, (json.dumps(result) + "\n").encode())
        status = 0
    finally:
        os._exit(status)


def _result(job: _Job) -> dict[str, Any]:
    begin, cpu = time.perf_counter(), _cpu_seconds()
    result: dict[str, Any] = {}
    try:
        compiled = compile_one(job.variant)
        if job.launcher:
            compile_launcher(compiled)
        if job.utils:
            compile_utils()
    except Exception as error:
        sentence = (str(error).strip().splitlines() or ["no message"])[0]
        result["error"] = f"{type(error).__name__}: {sentence}"[:500]
    return result | {"seconds": time.perf_counter() - begin, "cpu": _cpu_seconds() - cpu}


def _cpu_seconds() -> float:
    """Of this process and of the compilers that it has called."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def compile_one(variant: Variant) -> Any:
    """Compiles a kernel, or finds it in the cache; within `standing_in`."""
    return variant.kernel.preload(variant.data)


def compile_launcher(compiled: Any) -> None:
    """Builds what Triton loads to launch a kernel, where its version builds such a thing."""
    if not hasattr(cuda, "make_launcher"):
        return
    with suppress(ImportError):  # Built and stored; it cannot be loaded without a driver.
        cuda.CudaLauncher(compiled.src, compiled.metadata)


def compile_utils() -> None:
    """Builds what Triton loads to talk to the driver."""
    with suppress(ImportError):
        cuda.CudaUtils()


@contextmanager
def linkable() -> Iterator[None]:
    """Has launchers link against an empty library where the CUDA driver is not installed."""
    if _has_driver():
        yield
        return
    # They are built and stored all the same.
    logging.getLogger("triton.runtime.build").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "libcuda.so.1")
        compiler = shutil.which("gcc") or shutil.which("clang") or "cc"
        command = [compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-o", library]
        subprocess.run([*command, "-xc", os.devnull], check=True, capture_output=True)
        before, knobs.nvidia.libcuda_path = knobs.nvidia.libcuda_path, folder
        try:
            yield
        finally:
            knobs.nvidia.libcuda_path = before


def _has_driver() -> bool:
    """Whether Triton finds the library that launchers are linked against."""
    try:
        cuda.libcuda_dirs()
    except (AssertionError, OSError, subprocess.SubprocessError):
        return False
    return True

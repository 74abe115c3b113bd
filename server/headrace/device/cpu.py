"""The CPU as a device: launches are synchronous, and host memory is device memory."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headrace.device.base import Download, DtypeChoice, Graph, Recorder, Staging, Timer
from headrace.device.weights import HostStager, WeightStager
from headrace.memory import Room

# The KV pool of a CPU server when nobody says otherwise: the smaller of this share of the free
# memory and this many bytes (R9).
KV_SHARE_DEFAULT = 0.25
KV_BYTES_DEFAULT = 4 << 30

# CPU flags that mean that bfloat16 products are computed, not emulated.
BF16_FLAGS = ("amx_bf16", "avx512_bf16")

# A cgroup without a limit reports a number about as large as the address space.
CGROUP_UNLIMITED = 1 << 60


class CpuDevice:
    """All cores this process may run on, or a share of them."""

    kind = "cpu"
    asynchronous = False
    capability: tuple[int, int] = (0, 0)
    multiprocessors = 0
    graphs = False
    reserve_bytes = 0

    def __init__(self, threads: int = 0, ranks: int = 1, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self.torch_device = torch.device("cpu")
        model, self.flags = _cpu_info(proc / "cpuinfo")
        self.name = f"cpu ({model})" if model else "cpu"
        self.threads = threads or max(1, usable_cores() // ranks)

    def start(self) -> None:
        """Sets the number of threads of the calling thread's parallel loops."""
        torch.set_num_threads(self.threads)

    def free_bytes(self) -> int:
        """What the kernel says is available, within the limits of this process's cgroups."""
        return min([_meminfo(self._proc / "meminfo", "MemAvailable"), *_cgroup_rooms(self._proc)])

    def room(self) -> Room:
        """The machine's memory; what is free is so within this process's limits."""
        return Room(_meminfo(self._proc / "meminfo", "MemTotal"), self.free_bytes())

    def trim(self) -> None:
        """Nothing: the C library decides."""

    def kv_budget(self, fraction: float, bytes_max: int, ranks: int) -> int:
        """A quarter of the free memory and 4 GiB at most, unless told; shared by the ranks."""
        share = fraction if fraction > 0 else KV_SHARE_DEFAULT
        if fraction > 0 or bytes_max > 0:
            bound = bytes_max or self.free_bytes()
        else:
            bound = KV_BYTES_DEFAULT // ranks
        if bytes_max > 0 and fraction == 0:
            share = 0.9
        return min(int(self.free_bytes() * share) // ranks, bound)

    def default_dtype(self, checkpoint: torch.dtype) -> DtypeChoice:
        """bfloat16 where the CPU multiplies it, float32 elsewhere; whatever the checkpoint."""
        found = [flag for flag in BF16_FLAGS if flag in self.flags]
        stored = str(checkpoint).removeprefix("torch.")
        if found:
            why = f"the CPU has {' and '.join(found)} (checkpoint: {stored})"
            return DtypeChoice(torch.bfloat16, why)
        why = f"the CPU has neither amx_bf16 nor avx512_bf16 (checkpoint: {stored})"
        return DtypeChoice(torch.float32, why)

    def host_buffer(self, length: int, dtype: torch.dtype) -> Tensor:
        """Plain memory."""
        return torch.zeros(length, dtype=dtype)

    def upload(self, host: Tensor) -> Tensor:
        """The tensor itself: host memory is device memory."""
        return host

    def to_device(self, array: np.ndarray) -> Tensor:
        """The array's own memory."""
        return torch.from_numpy(array)

    def staging(self, size: int, stages: int) -> Staging:
        """Host buffers that are used in turn."""
        return _HostStaging(size, stages)

    def download(self, tensors: list[Tensor]) -> Download:
        """Views: what was launched is done."""
        return _Ready([tensor.numpy() for tensor in tensors])

    def capture(self, work: Callable[[], None]) -> Graph:
        """Refuses: there is no launch to save."""
        raise NotImplementedError("the CPU records no graphs")

    def recorder(self) -> Recorder:
        """Refuses, as `capture` does."""
        raise NotImplementedError("the CPU records no graphs")

    def alias(self, tensor: Tensor) -> Tensor:
        """The tensor itself: nothing is recorded."""
        return tensor

    def timer(self) -> Timer:
        """Wall time: the device is this thread."""
        return _WallTimer()

    def weight_stager(self, buffer_bytes: int, buffers: int) -> WeightStager:
        """Plain memory."""
        return HostStager(buffer_bytes, buffers)


class _HostStaging:
    """The device reads the host's buffers."""

    def __init__(self, size: int, stages: int) -> None:
        self._buffers = [torch.zeros(size, dtype=torch.uint8) for _ in range(stages)]
        self._arrays = [buffer.numpy() for buffer in self._buffers]

    def host(self, step: int) -> np.ndarray:
        return self._arrays[step % len(self._arrays)]

    def send(self, step: int, used: int) -> Tensor:
        return self._buffers[step % len(self._buffers)][:used]

    def inbox(self) -> Tensor:
        return self._buffers[0]


class _WallTimer:
    """Between two readings of the clock."""

    def __init__(self) -> None:
        self._begin_ns = time.perf_counter_ns()
        self._end_ns = self._begin_ns

    def stop(self) -> None:
        self._end_ns = time.perf_counter_ns()

    def micros(self) -> int:
        return (self._end_ns - self._begin_ns) // 1000


class _Ready:
    """Arrays that need no waiting."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        self._arrays = arrays

    def done(self) -> bool:
        return True

    def wait(self) -> list[np.ndarray]:
        return self._arrays


def usable_cores() -> int:
    """Cores this process may run on: affinity, and the CPU quota of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def _cpu_info(path: Path) -> tuple[str, frozenset[str]]:
    """The model's name and the flags of the first core."""
    model, flags = "", frozenset[str]()
    try:
        text = path.read_text()
    except OSError:
        return model, flags
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
    return model, flags


def _meminfo(path: Path, key: str) -> int:
    """A line of meminfo in bytes."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 1 << 30


def _cgroup_rooms(proc: Path) -> list[int]:
    """Bytes left below the memory limits of this process's cgroup and of its parents.

    File pages count as room: the kernel drops them before it refuses an allocation.
    """
    rooms: list[int] = []
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return rooms
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            root = Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            names = (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            rooms.extend(_cgroup_room(folder, *names))
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    return rooms


def _cgroup_room(folder: Path, limit: str, usage: str, cache: str) -> list[int]:
    """The room of one cgroup, or nothing when it has no limit."""
    try:
        bound = (folder / limit).read_text().strip()
        if bound == "max" or int(bound) >= CGROUP_UNLIMITED:
            return []
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [max(0, int(bound) - used + int(stat.get(cache, 0)))]

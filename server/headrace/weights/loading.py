"""Weights on their way to a device: threads fill host buffers while earlier ones are copied.

Reading needs neither the operations nor the other ranks, so it begins before those are there, and
whoever needs the weights waits for the rest.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
import time
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from headrace.device.base import Device
from headrace.device.cpu import usable_cores
from headrace.device.weights import WeightBuffer, WeightStager
from headrace.errors import CheckpointError, DeviceError
from headrace.weights.checkpoint import read_headers
from headrace.weights.names import Names
from headrace.weights.plan import Copy, Read, ReadPlan, plan_reads
from headrace.weights.want import Want, check_coverage

log = logging.getLogger(__name__)

# Bytes of one read: large enough that a read's own cost does not show, small enough that the ring
# of them is a fraction of a gigabyte.
CHUNK_BYTES = 16 << 20
# Threads that read: more than a few add nothing, and one would leave the bus idle while it waits.
READERS_MIN, READERS_MAX = 2, 8
# Buffers beyond one a reader, which are being copied meanwhile.
BUFFERS_IN_FLIGHT = 4
# How long a thread that computes in Python keeps a reader waiting for the interpreter. The default,
# 5 ms, is as long as a read: readers would wait most of the time while the caller imports.
SWITCH_S = 0.0002
# Whoever waits longer than this is told how far it is, and so often.
PROGRESS_EVERY_S = 2.0


class Loading(Protocol):
    """A model's tensors, being made."""

    wants: list[Want]

    def wait(self) -> list[Tensor]:
        """Returns the tensors, on the device, one a want; raises what went wrong."""
        ...

    def seconds(self) -> float:
        """From the first read to the last copy; known after `wait`."""
        ...


class FileLoading:
    """Weights read from safetensors files."""

    def __init__(
        self,
        wants: list[Want],
        plan: ReadPlan,
        device: Device,
        *,
        readers: int = READERS_MAX,
    ) -> None:
        """Allocates all tensors and starts reading. Call it in the thread that owns the device."""
        self.wants = wants
        self._plan = plan
        self._begin = self._end = time.monotonic()
        self._tensors = empty_tensors(wants, device)
        self._stager = device.weight_stager(plan.buffer_bytes, readers + BUFFERS_IN_FLIGHT)
        self._next = itertools.count()  # Its `next` is atomic: each read is one thread's.
        self._error: BaseException | None = None
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._files: dict[Path, int] = {}
        self._closing = ExitStack()
        for path in sorted({read.path for read in plan.reads}):
            self._files[path] = self._open(path)
        self._threads = [
            threading.Thread(target=self._work, name=f"weights-{i}", daemon=True)
            for i in range(min(readers, len(plan.reads)))
        ]
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        for thread in self._threads:
            thread.start()

    def wait(self) -> list[Tensor]:
        for thread in self._threads:
            while thread.is_alive():
                thread.join(self._until_next_line())
                if thread.is_alive():
                    self._tell_progress()
        sys.setswitchinterval(self._switch_s)
        self._closing.close()
        self._stager.finish()
        if self._error is not None:
            raise self._error
        seconds = self.seconds()
        log.info(
            "weights: %.2f GB read and copied in %.2f s, %.1f GB/s, by %d threads",
            self._plan.nbytes / 1e9,
            seconds,
            self._plan.nbytes / 1e9 / max(seconds, 1e-9),
            len(self._threads),
        )
        return self._tensors

    def seconds(self) -> float:
        return self._end - self._begin

    def _open(self, path: Path) -> int:
        try:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            self._closing.close()
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._closing.callback(os.close, file)
        return file

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while self._error is None:
                number = next(self._next)
                if number >= len(self._plan.reads):
                    break
                read = self._plan.reads[number]
                buffer = self._stager.take()
                fill(self._files[read.path], read, buffer)
                with self._stager.copying(buffer):
                    place(read, buffer, self._stager, self._tensors)
                with self._lock:
                    self._done_bytes += read.nbytes
        except BaseException as error:
            self._error = error
        finally:
            self._end = time.monotonic()

    def _until_next_line(self) -> float:
        passed = time.monotonic() - self._begin
        return PROGRESS_EVERY_S - passed % PROGRESS_EVERY_S

    def _tell_progress(self) -> None:
        done, whole = self._done_bytes, self._plan.nbytes
        log.info("weights: %d %% of %.1f GB", 100 * done // max(whole, 1), whole / 1e9)


# Codes go up to so many times the scale, roughly.
SCALE_DIVISOR = 8


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales of codes."""
    leaf = name.rpartition(".")[2]
    return leaf == "scales" or leaf.startswith(("weight_scale", "input_scale"))


class DummyLoading:
    """Random weights that depend on nothing but a tensor's name and shape, made on the device."""

    _STD = 0.02

    def __init__(self, wants: list[Want], device: Device) -> None:
        self.wants = wants
        begin = time.monotonic()
        generator = torch.Generator(device=device.torch_device)
        self._tensors = empty_tensors(wants, device)
        for want, tensor in zip(wants, self._tensors, strict=True):
            for piece in want.pieces():
                whole = torch.empty(piece.full, dtype=want.dtype, device=tensor.device)
                self._draw(whole, piece.source, generator)
                length = piece.stop - piece.start
                into = tensor.narrow(want.split.dim, piece.at, length)
                into.copy_(whole.narrow(want.split.dim, piece.start, length))
        self._seconds = time.monotonic() - begin

    def wait(self) -> list[Tensor]:
        return self._tensors

    def seconds(self) -> float:
        return self._seconds

    def _draw(self, whole: Tensor, name: str, generator: torch.Generator) -> None:
        if whole.dtype.itemsize == 1 or not whole.dtype.is_floating_point:
            if name.endswith("qzeros"):
                whole.view(torch.uint8).fill_(0x77)  # symmetric, as most checkpoints are
                return
            generator.manual_seed(zlib.crc32(name.encode()))
            # Any bits are codes; as float8 those below 0x78 are small numbers and never NaN.
            most = 0x78 if whole.dtype.is_floating_point else 0x100
            if name.endswith("g_idx"):
                most = 1  # one group
            whole.view(torch.uint8).random_(0, most, generator=generator)
            return
        if is_scale(name):
            whole.fill_(self._STD / SCALE_DIVISOR)
            return
        if whole.dim() == 1 and name.endswith("weight"):
            whole.fill_(1)  # a norm
            return
        # The whole tensor on every rank, so that a rank's share is the same numbers whatever
        # the number of ranks.
        generator.manual_seed(zlib.crc32(name.encode()))
        whole.normal_(0, self._STD, generator=generator)


def start_files(
    wants: list[Want],
    names: Names,
    folder: Path,
    device: Device,
    *,
    readers: int = READERS_MAX,
    chunk_bytes: int = CHUNK_BYTES,
) -> FileLoading:
    """Checks a folder's headers against what is wanted, and starts reading.

    Missing and unused tensors, wrong shapes and dtypes are a CheckpointError that names them.
    """
    stored = read_headers(folder)
    check_coverage(wants, names, set(stored))
    return FileLoading(wants, plan_reads(wants, stored, chunk_bytes), device, readers=readers)


def readers_of(ranks: int) -> int:
    """Returns the threads that read for one rank: all ranks share the machine's cores."""
    return max(READERS_MIN, min(READERS_MAX, usable_cores() // ranks))


def empty_tensors(wants: list[Want], device: Device) -> list[Tensor]:
    """Allocates what is wanted; only the padding has a value. A DeviceError if there is no room."""
    needed, room = sum(want.nbytes for want in wants), device.room()
    free = room.free + room.cached
    if needed > free:
        raise DeviceError(
            f"the weights take {needed / 1e9:.2f} GB, and {device.name} has {free / 1e9:.2f} free"
        )
    tensors = [
        torch.empty(want.shape, dtype=want.dtype, device=device.torch_device) for want in wants
    ]
    for want, tensor in zip(wants, tensors, strict=True):
        want.zero_padding(tensor)
    return tensors


def fill(file: int, read: Read, buffer: WeightBuffer) -> None:
    """Reads a range of a file into a buffer; other threads run meanwhile."""
    view = memoryview(buffer.array.data)
    done = 0
    while done < read.nbytes:
        try:
            count = os.preadv(file, [view[done : read.nbytes]], read.offset + done)
        except OSError as error:
            raise CheckpointError(f"{read.path} cannot be read: {error}") from error
        if count == 0:
            raise CheckpointError(f"{read.path} cannot be read: it ends too early")
        done += count


def place(read: Read, buffer: WeightBuffer, stager: WeightStager, tensors: list[Tensor]) -> None:
    """Launches the copies of a read; within `stager.copying(buffer)`."""
    for copy in read.copies:
        stored = buffer.tensor[copy.at : copy.at + copy.nbytes].view(copy.dtype)
        stored = stored.view(copy.rows, copy.width)
        target = _target(copy, tensors[copy.want])
        as_it_is = stored.dtype == target.dtype and stored.shape == target.shape
        if as_it_is and target.is_contiguous():
            target.copy_(stored, non_blocking=True)
        else:
            # Numbers are converted, and columns cut out, where there is bandwidth for it.
            target.copy_(stager.to_device(stored)[:, copy.first : copy.last])


def _target(copy: Copy, tensor: Tensor) -> Tensor:
    matrix = tensor.view(tensor.shape[0], -1)
    rows = matrix[copy.row : copy.row + copy.rows]
    return rows[:, copy.column : copy.column + copy.last - copy.first]

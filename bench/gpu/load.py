"""Loading a checkpoint that is in the page cache: by how many threads, in reads of which size.

    PYTHONPATH=server python3 bench/gpu/load.py MODEL_FOLDER [--gigabytes 4] [--device cuda]

First the whole of it as a server does it, each phase timed, and some tensors compared with what the
safetensors library reads. Then a part of the files, again and again: into pinned buffers alone, and
on to the device. Pinning is timed apart, because a server does it once. Last, random weights.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from headrace import ops
from headrace.comm import SingleComm
from headrace.device import Device, open_device
from headrace.models import Decoder, begin_loading, load_model, read_spec
from headrace.startup import Phases
from headrace.weights import Loading, SafetensorsReader, Want
from headrace.weights.checkpoint import read_headers
from headrace.weights.loading import BUFFERS_IN_FLIGHT, DummyLoading, fill, place
from headrace.weights.plan import Read, ReadPlan, plan_reads

THREADS = (1, 4, 8, 16)
CHUNKS_MIB = (8, 16, 64, 128)
GB = 1e9
COMPARED = 5  # tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4, help="read for one cell of the table")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    device = open_device(arguments.device)
    device.start()
    torch.zeros(1, device=device.torch_device)
    print(f"{device.name}, context in {time.perf_counter() - begin:.2f} s")
    phases = Phases()
    wants, tensors = whole(arguments.folder, device, phases)
    print(phases.table())
    if wants and tensors:
        compare(arguments.folder, wants, tensors)
        table(arguments.folder, wants, tensors, device, int(arguments.gigabytes * GB))
        for _ in range(2):  # The first one compiles nothing, but it allocates.
            begin = time.perf_counter()
            made = DummyLoading(wants, device).wait()
            made[-1].view(-1)[:1].cpu()
            print(f"random weights in {time.perf_counter() - begin:.2f} s")
            del made


def whole(
    folder: Path, device: Device, phases: Phases
) -> tuple[list[Want], list[torch.Tensor]] | tuple[None, None]:
    """Loads the model as a server does; returns its tensors before they are packed."""
    spec = read_spec(folder)
    dtype = device.default_dtype(spec.checkpoint_dtype).dtype
    with phases("plan"):
        loading = begin_loading(
            folder, device=device, dtype=dtype, rank=0, ranks=1, load_format="auto"
        )
    with phases("operations"):
        table = ops.select(spec.op_spec(dtype, 1), device)
    kept = None if loading is None else Kept(loading)
    model: Decoder = load_model(
        folder,
        device=device,
        dtype=dtype,
        comm=SingleComm(),
        ops=table,
        load_format="auto",
        loading=kept,
        phases=phases,
    )
    print(f"{model.weight_bytes / GB:.2f} GB of weights")
    return (None, None) if kept is None else (kept.wants, kept.wait())


class Kept:
    """Remembers the tensors that a loading made."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading
        self.wants = loading.wants
        self._tensors: list[torch.Tensor] = []

    def wait(self) -> list[torch.Tensor]:
        self._tensors = self._tensors or self._loading.wait()
        return self._tensors

    def seconds(self) -> float:
        return self._loading.seconds()


def compare(folder: Path, wants: list[Want], tensors: list[torch.Tensor]) -> None:
    """Says whether some tensors have the numbers that another reader finds in the files."""
    reader = SafetensorsReader(folder)
    step = max(1, len(wants) // COMPARED)
    for want, tensor in list(zip(wants, tensors, strict=True))[::step]:
        for piece in want.pieces():
            length = piece.stop - piece.start
            found = tensor.narrow(want.split.dim, piece.at, length).cpu()
            plain = reader.read(piece.source, piece.full, want.split.dim, piece.start, piece.stop)
            if not torch.equal(found, plain.to(found.dtype)):
                print(f"WRONG: {piece.source}")
    print("compared with the safetensors library")


def table(
    folder: Path, wants: list[Want], tensors: list[torch.Tensor], device: Device, limit: int
) -> None:
    """Prints GB/s of reading, and of reading and copying, and the seconds of pinning."""
    stored = read_headers(folder)
    print(f"{'MiB':>4} {'threads':>7} {'plan s':>7} {'pin s':>6} {'read GB/s':>10} {'+copy':>6}")
    for chunk, threads in itertools.product(CHUNKS_MIB, THREADS):
        try:
            begin = time.perf_counter()
            plan = plan_reads(wants, stored, chunk << 20)
            planned = time.perf_counter() - begin
            part = ReadPlan(tuple(first(plan, limit)), plan.buffer_bytes)
            pinned, read = run(part, tensors, device, threads, copying=False)
            _, copied = run(part, tensors, device, threads, copying=True)
        except Exception as error:
            print(f"{chunk:4} {threads:7} failed: {error}")
            continue
        rates = f"{part.nbytes / read / GB:10.1f} {part.nbytes / copied / GB:6.1f}"
        print(f"{chunk:4} {threads:7} {planned:7.3f} {pinned:6.2f} {rates}")


def first(plan: ReadPlan, limit: int) -> Iterator[Read]:
    """The reads of a plan up to some number of bytes."""
    done = 0
    for read in plan.reads:
        if done >= limit:
            return
        done += read.nbytes
        yield read


def run(
    plan: ReadPlan, tensors: list[torch.Tensor], device: Device, threads: int, *, copying: bool
) -> tuple[float, float]:
    """Seconds of making the buffers, and of the reads by so many threads."""
    begin = time.perf_counter()
    stager = device.weight_stager(plan.buffer_bytes, threads + BUFFERS_IN_FLIGHT)
    for buffer in [stager.take() for _ in range(threads + BUFFERS_IN_FLIGHT)]:
        with stager.copying(buffer):
            pass
    pinned = time.perf_counter() - begin
    files = {path: path.open("rb", buffering=0) for path in {read.path for read in plan.reads}}
    turn = itertools.count()

    @torch.inference_mode()
    def work() -> None:
        while (number := next(turn)) < len(plan.reads):
            read = plan.reads[number]
            buffer = stager.take()
            fill(files[read.path].fileno(), read, buffer)
            with stager.copying(buffer):
                if copying:
                    place(read, buffer, stager, tensors)

    begin = time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    stager.finish()
    seconds = time.perf_counter() - begin
    for file in files.values():
        file.close()
    return pinned, seconds


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What it costs that ranks sum a layer's output and normalise it, on all GPUs of this machine.

    PYTHONPATH=server python3 bench/gpu/ranks.py [--width 4096] [--rows 1 64 2048] [--ranks 2]

Microseconds of a sum, the residual's addition and the norm, rows of bfloat16, the fastest of five
replays of a graph of 32: through NCCL and a norm, through the two-shot sum of PyTorch's symmetric
memory and a norm, in one launch of ours; and the norm alone, which one GPU needs as well. NCCL is
launched by operation, 32 times, since the server records no graph with it.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, multiprocessing

from headrace.comm import Comm, join_group
from headrace.device.cuda import CudaDevice
from headrace.ops.reduce_norm.triton import TritonReduceNorms
from headrace.ops.rms_norm.triton import TritonRmsNorm
from headrace.ops.triton import gpu_at

LAUNCHES = 32
REPLAYS = 5
EPS = 1e-5
TIMEOUT_S = 60


def micros(comm: Comm, work: Callable[[int], object], record: bool) -> float:
    """Of one of `LAUNCHES` calls; all ranks measure together."""
    for i in range(2):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if record:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for i in range(LAUNCHES):
                work(i)

    def run() -> None:
        if record:
            graph.replay()
        else:
            for i in range(LAUNCHES):
                work(i)

    best = float("inf")
    run()
    for _ in range(REPLAYS):
        comm.min_int(0)
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / LAUNCHES)
    return best


def rank_main(rank: int, size: int, address: str, width: int, rows: list[int], out: Any) -> None:
    device = CudaDevice(rank)
    with torch.inference_mode():
        device.start()
        comm = join_group(device, rank, size, address, TIMEOUT_S)
        where = device.torch_device
        gpu = gpu_at(where)
        norm = TritonRmsNorm(gpu)
        op = TritonReduceNorms(gpu, torch.bfloat16)(comm.share, size, width)
        comm.reserve(max(rows) * width, torch.bfloat16)
        group = comm._group if comm.recordable else comm  # pyright: ignore
        weight = torch.randn(width, device=where).bfloat16()
        for count in rows:
            residual = torch.randn((count, width), device=where).bfloat16()
            x = [torch.randn((count, width), device=where).bfloat16() for _ in range(LAUNCHES)]

            def added(summed: Tensor, stream: Tensor = residual) -> Tensor:
                return norm.add_rms_norm(summed, stream, weight, EPS)[0]

            row: dict[str, Any] = {"rows": count}
            row["norm"] = micros(comm, lambda i, x=x: added(x[i]), True)
            row["nccl"] = micros(comm, lambda i, x=x: added(group.all_reduce(x[i])), False)
            if comm.recordable:
                row["two-shot"] = micros(comm, lambda i, x=x: added(comm.all_reduce(x[i])), True)
            if op is not None and count <= op.rows_max:
                row["ours"] = micros(
                    comm, lambda i, x=x, r=residual: op(x[i], r, weight, EPS), True
                )
            out.put((rank, row))
        comm.min_int(0)
        comm.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    options = parser.parse_args()
    rows = options.rows or [1, 8, 32, 64, 128, 256, 512, 2048, 8192]
    if options.ranks < 2:
        sys.exit("there are no two GPUs")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    out = context.SimpleQueue()
    processes = [
        context.Process(
            target=rank_main, args=(r, options.ranks, address, options.width, rows, out)
        )
        for r in range(options.ranks)
    ]
    for process in processes:
        process.start()
    print(f"{torch.cuda.get_device_name()}, {options.ranks} of them, width {options.width}, us:")
    names = ("norm", "nccl", "two-shot", "ours")
    print("rows".rjust(6), *(name.rjust(9) for name in names))
    for _ in range(len(rows) * options.ranks):
        rank, row = out.get()
        if rank == 0:
            figures = (f"{row[n]:9.1f}" if n in row else "-".rjust(9) for n in names)
            print(f"{row['rows']:6d}", *figures, flush=True)
    for process in processes:
        process.join(10)
    os._exit(0)


if __name__ == "__main__":
    main()

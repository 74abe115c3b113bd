"""Ranks as processes that write each other's memory: a GPU each, where there are enough.

Fewer GPUs than ranks are shared: their processes take turns, so that a rank which waits for another
waits for its turn as well. Slow, but the kernels, graphs and memory are those of a GPU each; only
NCCL refuses, and gloo stands in for it. Without GPUs kernels run in Triton's interpreter, and what
ranks share is ordinary shared memory.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, multiprocessing

from headrace.comm import Comm, join_group
from headrace.comm.dist import DistComm
from headrace.comm.symmetric import share_memory
from headrace.device import Device, Peers, Share
from headrace.device.cpu import CpuDevice
from headrace.ops.triton import INTERPRETED, Gpu, gpu_at

# In the interpreter three ranks compute for 140 s on two quiet cores, and for more than twice that
# beside other work; what is lost for good ends by a test's own limit.
TIMEOUT_S = 560
# Shared memory of a rank, where there is no GPU to ask for it, and what each piece is aligned to.
SLAB_BYTES = 16 << 20
ALIGNMENT = 256


@dataclass(frozen=True)
class Rank:
    """What a rank's work is given."""

    rank: int
    size: int
    device: torch.device
    gpu: Gpu
    share: Share
    comm: Comm


class _Slabs:
    """Hands out pieces of memory that all processes have mapped, each at addresses of its own."""

    def __init__(self, rank: int, slabs: list[Tensor]) -> None:
        self._rank = rank
        self._slabs = slabs
        self._used = 0

    def share(self, size: int) -> Peers:
        at = self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        assert self._used <= SLAB_BYTES, "tests need larger slabs"
        addresses = [slab.data_ptr() + at for slab in self._slabs]
        memory = self._slabs[self._rank][at : at + size]
        return Peers(self._rank, len(self._slabs), memory, torch.tensor(addresses))


class SharingComm(DistComm):
    """A group over gloo whose ranks share memory as GPUs do."""

    recordable = True

    def __init__(self, rank: int, size: int, address: str, share: Share) -> None:
        super().__init__(CpuDevice(threads=1), rank, size, address, TIMEOUT_S)
        self._share = share

    def share(self, size: int) -> Peers | None:
        return self._share(size)


def _main(
    work: Callable[..., Any], rank: int, size: int, slabs: list[Tensor], address: str, out: Any,
    arguments: tuple[Any, ...],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    try:
        run = _run_on_gpu if torch.cuda.is_available() else _run_here
        out.put((rank, run(work, rank, size, slabs, address, arguments)))
    except BaseException:
        out.put((rank, Failed(traceback.format_exc())))


@dataclass(frozen=True)
class Failed:
    """What a rank died of."""

    trace: str


def _run_on_gpu(
    work: Callable[..., Any], rank: int, size: int, slabs: list[Tensor], address: str,
    arguments: tuple[Any, ...],
) -> Any:  # fmt: skip
    from headrace.device.cuda import CudaDevice

    del slabs
    gpus = torch.cuda.device_count()
    device = CudaDevice(rank % gpus)
    with torch.inference_mode():
        device.start()
        join = join_group if gpus >= size else _join_on_shared_gpus
        comm = join(device, rank, size, address, TIMEOUT_S)
        where = device.torch_device
        result = work(Rank(rank, size, where, gpu_at(where), comm.share, comm), *arguments)
        torch.cuda.synchronize()
    comm.min_int(0)  # Nobody leaves while another still reads what it wrote.
    comm.close()
    return result


def _join_on_shared_gpus(
    device: Device, rank: int, size: int, address: str, timeout_s: float
) -> Comm:
    # PyTorch takes two ranks of one GPU for a mistake unless told otherwise.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    comm = share_memory(DistComm(device, rank, size, address, timeout_s, backend="gloo"), device)
    assert comm.recordable, "processes of one GPU cannot share its memory"
    return comm


def _run_here(
    work: Callable[..., Any], rank: int, size: int, slabs: list[Tensor], address: str,
    arguments: tuple[Any, ...],
) -> Any:  # fmt: skip
    comm = SharingComm(rank, size, address, _Slabs(rank, slabs).share)
    here = Rank(rank, size, torch.device("cpu"), INTERPRETED, comm.share, comm)
    result = work(here, *arguments)
    comm.min_int(0)
    comm.close()
    return result


def run_processes(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs `work(rank, *arguments)` in a process a rank; returns what they return, in rank order.

    Args:
        work: a function of a module; what it returns must be made of Python and NumPy.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    slabs = [torch.zeros(SLAB_BYTES, dtype=torch.uint8).share_memory_() for _ in range(size)]
    out = context.Queue()
    processes = [
        context.Process(
            target=_main, args=(work, r, size, slabs, address, out, arguments), daemon=True
        )
        for r in range(size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            rank, result = out.get(timeout=TIMEOUT_S)
            assert not isinstance(result, Failed), f"rank {rank}: {result.trace}"
            results[rank] = result
        return [results[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.join(0 if len(results) < size else 10)
            process.kill()

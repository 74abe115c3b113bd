"""Loading decoders in tests: one line for a folder, a dtype and a rank."""

from __future__ import annotations

from pathlib import Path

import torch

from headrace.comm import Comm, SingleComm
from headrace.device.cpu import CpuDevice
from headrace.models import Decoder, load_model, read_scheme, read_spec
from headrace.ops import OpTable, select
from headrace.testing.paged import PagedRunner

PROMPT = [1, 77, 300, 12, 5, 508, 260, 33, 4, 90, 91, 92, 93, 350, 7, 7, 7, 123, 45]


def load(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    comm: Comm | None = None,
    reference: bool = False,
    load_format: str = "auto",
    quantize: str = "",
    kv_dtype: torch.dtype | None = None,
) -> tuple[Decoder, OpTable]:
    """Loads a rank of a folder's model on one thread, and the ops it was loaded with."""
    comm = comm or SingleComm()
    device = CpuDevice(threads=1)
    scheme = read_scheme(folder, quantize)
    spec = read_spec(folder).op_spec(dtype, comm.size, scheme, kv_dtype)
    ops = select(spec, device, reference)
    model = load_model(
        folder,
        device=device,
        dtype=dtype,
        comm=comm,
        ops=ops,
        load_format=load_format,
        quantize=quantize,
        kv_dtype=kv_dtype,
    )
    return model, ops


def runner(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    comm: Comm | None = None,
    reference: bool = False,
    block_tokens: int = 16,
    load_format: str = "auto",
    quantize: str = "",
    kv_dtype: torch.dtype | None = None,
) -> PagedRunner:
    """Loads a rank and gives it a pool full of NaN."""
    model, ops = load(
        folder,
        dtype=dtype,
        comm=comm,
        reference=reference,
        load_format=load_format,
        quantize=quantize,
        kv_dtype=kv_dtype,
    )
    return PagedRunner(
        model,
        ops,
        dtype=kv_dtype or dtype,
        comm=comm,
        block_tokens=block_tokens,
        blocks=64,
        fill=torch.nan,
    )

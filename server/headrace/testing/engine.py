"""A rank's engine for tests and benchmarks: what `load_engine` makes, without a configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from headrace.comm import Comm, SingleComm
from headrace.device import Device
from headrace.engine import Engine, Preparation
from headrace.load import engine_of
from headrace.models import load_model, read_scheme, read_spec
from headrace.ops import select
from headrace.prepare import graph_sizes
from headrace.runner import Runner


def load(
    folder: Path,
    device: Device,
    *,
    dtype: torch.dtype | None = None,
    comm: Comm | None = None,
    load_format: str = "auto",
    quantize: str = "",
    kv_dtype: torch.dtype | None = None,
    rows8: bool = False,
    reference: bool = False,
) -> Engine:
    """Loads a folder's model in the calling thread, which thereby owns the device.

    Args:
        dtype: None takes the device's own choice.
        quantize: see `quant.detect`.
        kv_dtype: of the KV cache, where that is not `dtype`.
        rows8: see `OpSpec`.
        reference: whether to take the reference operations, and no graphs.
    """
    device.start()
    comm = comm or SingleComm()
    spec = read_spec(folder)
    dtype = dtype or device.default_dtype(spec.checkpoint_dtype).dtype
    scheme = read_scheme(folder, quantize)
    table = select(spec.op_spec(dtype, comm.size, scheme, kv_dtype, rows8), device, reference)
    model = load_model(
        folder,
        device=device,
        dtype=dtype,
        comm=comm,
        ops=table,
        load_format=load_format,
        quantize=quantize,
        kv_dtype=kv_dtype,
    )
    return engine_of(
        model,
        table,
        device=device,
        comm=comm,
        dtype=dtype,
        kv_dtype=kv_dtype,
        reference=reference,
        graphs=device.graphs and not reference,
    )


def runner(engine: Engine, wanted: Preparation, blocks: int) -> Runner:
    """A runner with its graphs recorded, where the engine has any."""
    made = Runner(engine, wanted, blocks, graph_sizes(engine, wanted))
    made.capture()
    return made

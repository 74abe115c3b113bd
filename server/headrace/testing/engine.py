"""A rank's engine for tests and benchmarks: what `load_engine` makes, without a configuration."""

from __future__ import annotations

from pathlib import Path

import torch

from headrace.comm import Comm, SingleComm
from headrace.device import Device
from headrace.executor import Engine, GraphInputs, Preparation, Runner, graph_sizes
from headrace.models import load_model, read_spec
from headrace.ops import sampling, select


def load(
    folder: Path,
    device: Device,
    *,
    dtype: torch.dtype | None = None,
    comm: Comm | None = None,
    load_format: str = "auto",
    reference: bool = False,
) -> Engine:
    """Loads a folder's model in the calling thread, which thereby owns the device.

    Args:
        dtype: None takes the device's own choice.
        reference: whether to take the reference operations, and no graphs.
    """
    device.start()
    comm = comm or SingleComm()
    spec = read_spec(folder)
    dtype = dtype or device.default_dtype(spec.checkpoint_dtype).dtype
    table = select(spec.op_spec(dtype, comm.size), device, reference)
    model = load_model(
        folder, device=device, dtype=dtype, comm=comm, ops=table, load_format=load_format
    )
    graph_inputs = None
    if device.graphs and not reference:
        angles_LE = model.rotary.tabulate(spec.context_tokens_max)
        graph_inputs = GraphInputs(table.decode_inputs, angles_LE, model)
    return Engine(
        device=device,
        comm=comm,
        model=model,
        attention=table.paged_attention,
        sampling=sampling.select(device, reference),
        architecture=spec.architecture,
        vocab_size=spec.vocab_size,
        context_tokens_max=spec.context_tokens_max,
        layers=spec.layers,
        kv_heads=spec.local(comm.size).kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        weight_bytes=model.weight_bytes,
        kv_bytes_max=0,
        logits_dtype=dtype,
        graph_inputs=graph_inputs,
    )


def runner(engine: Engine, wanted: Preparation, blocks: int) -> Runner:
    """A runner with its graphs recorded, where the engine has any."""
    made = Runner(engine, wanted, blocks, graph_sizes(engine, wanted))
    made.capture()
    return made

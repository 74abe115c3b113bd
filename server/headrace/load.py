"""From the configuration to a loaded engine: device, group, operations, weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from headrace import ops
from headrace.comm import Comm, join_group
from headrace.config import Serve
from headrace.device import Device, open_device
from headrace.engine import Engine, GraphInputs
from headrace.errors import ConfigError
from headrace.kv import KvLayout
from headrace.models import (
    Decoder,
    ModelSpec,
    begin_loading,
    load_model,
    read_scheme,
    read_spec,
)
from headrace.ops import sampling
from headrace.ops.base import Reference
from headrace.ops.kv_write.base import CODES, code_max
from headrace.ops.quant_matmul import Kind
from headrace.ops.triton import FP8_CAPABILITY
from headrace.quant import Scheme
from headrace.startup import Phases

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# By their names in `serve.json`; the empty one is the model's dtype.
KV_DTYPES = {"": None, **{str(dtype).removeprefix("torch."): dtype for dtype in CODES}}


def load_engine(
    serve: Serve,
    rank: int,
    phases: Phases | None = None,
    kernels: Callable[[], None] | None = None,
) -> Engine:
    """Loads one rank; call it in the thread that will own the device.

    Waits for the other ranks of the group. What was chosen, and why, goes to the log.

    Args:
        phases: measures what the seconds are spent on.
        kernels: waits for what others compile for a GPU; called before a kernel is launched.
    """
    begin = time.perf_counter()
    phases = phases or Phases()
    shard = serve.shard(rank)
    ranks = len(serve.shards)
    spec = read_spec(serve.model.path)
    spec.local(ranks)  # Refuses what does not divide before anybody waits for a rank.
    with phases("device"):
        device = open_device(serve.device.kind, shard.device_index, serve.device.threads, ranks)
        device.start()
    log.info("device %s, %d threads", device.name, device.threads)
    dtype = _choose_dtype(serve, device, spec)
    kv_dtype = _choose_kv_dtype(serve, device)
    folder, load_format = serve.model.path, serve.model.load_format
    quantize = serve.model.quantize
    scheme = read_scheme(folder, quantize)
    if scheme.name != "none":
        log.info("weights %s, %s", scheme.name, "on load" if scheme.on_load else "as stored")
    with phases("plan of the reads"):
        # The weights come while the ranks find each other and the operations are loaded.
        loading = begin_loading(
            folder,
            device=device,
            dtype=dtype,
            rank=rank,
            ranks=ranks,
            load_format=load_format,
            quantize=quantize,
        )
    with phases("group"):
        timeout_s = serve.engine.prepare_deadline_ms / 1000
        comm = join_group(device, rank, ranks, shard.rendezvous, timeout_s)
    with phases("operations"):
        rows8 = serve.model.quantize_activations
        op_spec = spec.op_spec(dtype, ranks, scheme, kv_dtype, rows8)
        table = ops.select(op_spec, device, serve.device.reference_ops)
    if rows8:
        _refuse_rows8(scheme, table, serve.device.reference_ops)
    for line in table.table().splitlines():
        log.info("%s", line)
    model = load_model(
        folder,
        device=device,
        dtype=dtype,
        comm=comm,
        ops=table,
        load_format=load_format,
        quantize=quantize,
        kv_dtype=kv_dtype,
        loading=loading,
        phases=phases,
    )
    if kernels is not None and device.kind == "cuda":
        with phases("kernels"):
            kernels()
    log.info("%-16s %s", "step", model.step_choice)
    if kv_dtype is not None:
        _tell_scales(model, kv_dtype)
    log.info("%s loaded in %.1f s", spec.architecture, time.perf_counter() - begin)
    engine = engine_of(
        model,
        table,
        device=device,
        comm=comm,
        dtype=dtype,
        kv_dtype=kv_dtype,
        reference=serve.device.reference_ops,
        graphs=device.graphs and serve.device.graphs,
    )
    return replace(
        engine,
        kv_bytes_max=serve.device.kv_bytes_max,
        watermark=sampling.Watermark(serve.watermark.gamma, serve.watermark.delta),
        phases=phases,
    )


def engine_of(
    model: Decoder,
    table: ops.OpTable,
    *,
    device: Device,
    comm: Comm,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    reference: bool = False,
    graphs: bool = False,
) -> Engine:
    """What executes plans with a model that is loaded.

    Args:
        kv_dtype: of the KV cache, where that is not `dtype`.
        reference: whether to sample by the reference operations.
        graphs: whether to record steps as graphs; only where the device does.
    """
    spec = model.spec
    graph_inputs = None
    if graphs:
        angles_LE = model.rotary.tabulate(spec.context_tokens_max)
        graph_inputs = GraphInputs(table.decode_inputs, angles_LE, model)
    backend = sampling.select(device, reference)
    columns = model.head.columns
    shared_sampling = None
    if graphs and comm.size > 1:
        shared_sampling = sampling.shared_sampling(
            backend, device, comm.share, comm.size, spec.vocab_size, columns
        )
    return Engine(
        device=device,
        comm=comm,
        model=model,
        attention=table.paged_attention,
        sampling=backend,
        architecture=spec.architecture,
        vocab_size=spec.vocab_size,
        context_tokens_max=spec.context_tokens_max,
        layers=spec.layers,
        kv_heads=spec.local(comm.size).kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        weight_bytes=model.weight_bytes,
        kv_dtype=kv_dtype,
        kv_bytes_max=0,
        logits_dtype=dtype,
        graph_inputs=graph_inputs,
        width=spec.width,
        vocab_columns=columns,
        logits_stride=model.head.stride,
        shared_sampling=shared_sampling,
    )


def describe(serve: Serve) -> dict[str, str | int]:
    """The facts of the model and of what it would run on, without loading it."""
    spec = read_spec(serve.model.path)
    scheme = read_scheme(serve.model.path, serve.model.quantize)
    ranks = len(serve.shards)
    device = open_device(serve.device.kind, 0, serve.device.threads, ranks)
    dtype = _choose_dtype(serve, device, spec)
    kv_heads = spec.local(ranks).kv_heads
    kv_dtype = _choose_kv_dtype(serve, device) or dtype
    layout = KvLayout(spec.layers, kv_heads, spec.head_dim, 1, kv_dtype)
    return {
        "architecture": spec.architecture,
        "device": device.name,
        "dtype": str(dtype).removeprefix("torch."),
        "kv_dtype": str(kv_dtype).removeprefix("torch."),
        "weights": scheme.name,
        "ranks": ranks,
        "layers": spec.layers,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "context_tokens_max": spec.context_tokens_max,
        "kv_bytes_per_token": layout.bytes_per_token(),
    }


def _choose_dtype(serve: Serve, device: Device, spec: ModelSpec) -> torch.dtype:
    if serve.device.dtype == "auto":
        choice = device.default_dtype(spec.checkpoint_dtype)
        log.info("dtype %s: %s", str(choice.dtype).removeprefix("torch."), choice.why)
        return choice.dtype
    if serve.device.dtype not in DTYPES:
        known = ", ".join(["auto", *DTYPES])
        raise ConfigError(f"dtype `{serve.device.dtype}` is unknown; {known} exist")
    if serve.device.dtype == "float16" and device.kind == "cpu":
        raise ConfigError("dtype float16 is not served on the CPU; use bfloat16 or float32")
    log.info("dtype %s: as told", serve.device.dtype)
    return DTYPES[serve.device.dtype]


def _refuse_rows8(scheme: Scheme, table: ops.OpTable, reference_ops: bool) -> None:
    """Raises: ConfigError where nothing multiplies activations of eight bits as asked."""
    flag = "--quantize-activations"
    # What is made of 16 bits while loading has four bits only as numbers of a table.
    if scheme.on_load or Kind.INT4 not in scheme.kinds:
        raise ConfigError(
            f"{flag} rounds what is multiplied with integers of four bits, and weights are "
            f"{scheme.name}: take a checkpoint of gptq, awq or compressed-tensors with four bits, "
            f"or leave the flag out"
        )
    choice = next(choice for choice in table.choices if choice.op == Kind.INT4.value)
    if choice.name == Reference.name and not reference_ops:
        why = "".join(f"; {name}: {reason}" for name, reason in choice.refused)
        raise ConfigError(f"nothing here multiplies fast what {flag} asks for{why}")


def _choose_kv_dtype(serve: Serve, device: Device) -> torch.dtype | None:
    """The dtype of the KV cache, where it is not the model's."""
    name = serve.device.kv_dtype
    if name not in KV_DTYPES:
        known = ", ".join(filter(None, KV_DTYPES))
        raise ConfigError(f"device: kv_dtype is {name!r}; {known} exist")
    dtype = KV_DTYPES[name]
    if (
        dtype == torch.float8_e4m3fn
        and device.kind == "cuda"
        and device.capability < FP8_CAPABILITY
        and not serve.device.reference_ops
    ):
        here, needed = (".".join(map(str, of)) for of in (device.capability, FP8_CAPABILITY))
        raise ConfigError(
            f"--kv-cache-dtype fp8_e4m3fn needs compute capability {needed}, and {device.name} "
            f"has {here}: take fp8_e5m2, or leave the flag out"
        )
    return dtype


def _tell_scales(model: Decoder, kv_dtype: torch.dtype) -> None:
    """Says what the cache is kept in, and warns where the checkpoint has no scales for it."""
    name, layers, scaled = (
        str(kv_dtype).removeprefix("torch."),
        len(model.blocks),
        model.scaled_caches,
    )
    log.info("kv cache %s, scales of the checkpoint in %d of %d layers", name, scaled, layers)
    if scaled < layers:
        log.warning(
            "the checkpoint has no scales of the KV cache for %d of %d layers: 1.0 is taken, and "
            "keys and values beyond %g become that",
            *(layers - scaled, layers, code_max(kv_dtype)),
        )

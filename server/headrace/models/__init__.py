"""The architectures that are served, and the way from a folder to a decoder."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace import quant
from headrace.comm import Place
from headrace.errors import ConfigError
from headrace.layers.build import Build
from headrace.layers.linear import Linear
from headrace.models.decoder import Decoder
from headrace.models.fused import fuse
from headrace.models.hf import HfConfig
from headrace.models.spec import LocalSpec, ModelSpec
from headrace.ops import select
from headrace.ops.base import Yes
from headrace.ops.kv_write import KvScales
from headrace.quant import Scheme
from headrace.startup import Phases
from headrace.weights import (
    DummyLoading,
    DummyReader,
    Loading,
    Names,
    Reader,
    SafetensorsReader,
    assign,
    list_wants,
    pack,
    read_wants,
    readers_of,
    start_files,
)
from headrace.weights.checkpoint import read_headers
from headrace.weights.kv_scales import IGNORABLE as KV_SCALES
from headrace.weights.kv_scales import read_kv_scales

if TYPE_CHECKING:
    from headrace.layers.build import Comm, Device
    from headrace.ops import OpTable

__all__ = [
    "ARCHITECTURES",
    "Decoder",
    "HfConfig",
    "LocalSpec",
    "ModelSpec",
    "begin_loading",
    "load_model",
    "outline_model",
    "read_scheme",
    "read_spec",
    "spec_of",
]

# `architectures[0]` of config.json → the module that describes it.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def read_spec(path: Path) -> ModelSpec:
    """Reads the facts of the model in a folder; a ConfigError says what is not served."""
    return spec_of(HfConfig.read(path))


def spec_of(hf: HfConfig) -> ModelSpec:
    """Returns the facts that a `config.json` states; a ConfigError says what is not served."""
    return _architecture(hf).spec(hf)


def read_scheme(path: Path, quantize: str = "") -> Scheme:
    """Reads how the layers of the model in a folder are stored; see `quant.detect`."""
    return quant.detect(HfConfig.read(path).values, quantize)


def begin_loading(
    path: Path,
    *,
    device: Device,
    dtype: torch.dtype,
    rank: int,
    ranks: int,
    load_format: str,
    quantize: str = "",
) -> Loading | None:
    """Has threads read this rank's share of the weights while the caller prepares the rest.

    Returns None where memory of the device is memory of the host: there `load_model` reads, and
    nothing is gained by copying twice.
    """
    if not device.asynchronous:
        return None
    hf = HfConfig.read(path)
    spec: ModelSpec = _architecture(hf).spec(hf)
    # What is read depends on neither the operations nor the other ranks: stand-ins will do.
    table = select(spec.op_spec(dtype, ranks), device, reference=True)
    build = Build(table, Place(rank, ranks), dtype)
    held = _held(path, load_format)
    outline, names = _outline(build, hf, spec, quantize, held)
    wants = list_wants(outline, names)
    if load_format == "dummy":
        return DummyLoading(wants, device)
    return start_files(wants, names, path, device, readers=readers_of(ranks))


def load_model(
    path: Path,
    *,
    device: Device,
    dtype: torch.dtype,
    comm: Comm,
    ops: OpTable,
    load_format: str,
    quantize: str = "",
    kv_dtype: torch.dtype | None = None,
    loading: Loading | None = None,
    phases: Phases | None = None,
) -> Decoder:
    """Builds the decoder of a folder and fills it with this rank's share of the weights.

    Args:
        dtype: of activations and weights, whatever the checkpoint is stored in.
        ops: by `ops.select(spec.op_spec(dtype, comm.size), device)`.
        load_format: `auto` reads safetensors, `dummy` makes deterministic random weights.
        quantize: see `quant.detect`.
        kv_dtype: see `OpSpec`; with one the scales of the cache are read, too.
        loading: what `begin_loading` returned, if it was called.
        phases: measures building, reading and packing.
    """
    phases = phases or Phases()
    hf = HfConfig.read(path)
    spec: ModelSpec = _architecture(hf).spec(hf)
    spec.local(comm.size)  # Refuses what does not divide before anything is built.
    with phases("model"):
        build = Build(ops, comm, dtype)
        model, names = _outline(build, hf, spec, quantize, _held(path, load_format))
        wants = list_wants(model, names)
    loading = loading or begin_loading(
        path,
        device=device,
        dtype=dtype,
        rank=comm.rank,
        ranks=comm.size,
        load_format=load_format,
        quantize=quantize,
    )
    with phases("weights"):
        if loading is None and load_format == "dummy" and hf.values.get("quantization_config"):
            loading = DummyLoading(wants, device)
        if loading is not None:
            assert loading.wants == wants, "the weights that were read are another model's"
            assign(model, wants, loading.wait())
            phases.beside("reading weights", loading.seconds())
        else:
            reader: Reader = DummyReader() if load_format == "dummy" else SafetensorsReader(path)
            assign(model, wants, read_wants(wants, names, reader))
    if kv_dtype is not None and load_format != "dummy":
        _scale_cache(model, read_kv_scales(path, names, spec.layers))
    with phases("pack"):
        pack(model, device.torch_device)
        layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
        model.weight_bytes -= sum(layer.saved_bytes for layer in layers)
        answer = fuse(model, comm.size, kv_dtype)
    one_call = isinstance(answer, Yes)
    model.step_choice = f"{'one native call' if one_call else 'by operation'}: {answer.why}"
    return model.eval()


def _scale_cache(model: Decoder, scales: list[tuple[float, float] | None]) -> None:
    """Tells each layer its cache's scales; without any they stay 1."""
    for block, of_layer in zip(model.blocks, scales, strict=True):
        if of_layer is not None:
            attention: Any = block.attention
            attention.kv_scales = KvScales(*of_layer)
            model.scaled_caches += 1


def outline_model(
    hf: HfConfig,
    *,
    device: Device,
    dtype: torch.dtype,
    comm: Comm,
    ops: OpTable,
    quantize: str = "",
) -> Decoder:
    """Builds a rank's decoder without weights, for a device without memory.

    It has a layer of every kind that the model has, and the first: more would launch nothing that
    these do not.
    """
    spec: ModelSpec = _architecture(hf).spec(hf)
    windows = spec.windows[:1] + tuple(dict.fromkeys(spec.windows[1:]))
    spec = replace(spec, layers=len(windows), windows=windows)
    model, _ = _outline(Build(ops, comm, dtype), hf, spec, quantize, set())
    pack(model, device.torch_device)
    return model.eval()


def _outline(
    build: Build, hf: HfConfig, spec: ModelSpec, quantize: str, held: set[str]
) -> tuple[Decoder, Names]:
    """Builds a decoder on `meta` whose layers are stored as the checkpoint says, and its names.

    Args:
        held: tensors of the checkpoint, as far as they are known.
    """
    architecture = _architecture(hf)
    names: Names = architecture.NAMES.tie() if spec.tied else architecture.NAMES
    scheme = quant.detect(hf.values, quantize)
    model = Decoder(build, spec, architecture.RECIPE)
    for path, layer in model.named_modules():
        if isinstance(layer, Linear):
            modules = names.modules_of(path)
            stored = scheme.format_of(modules, layer is model.head)
            if stored is None or (layer is model.head and spec.tied):
                continue
            try:
                layer.store_as(stored, all(f"{module}.bias" in held for module in modules))
            except ConfigError as error:
                raise ConfigError(f"{' and '.join(modules)}: {error}") from error
    model.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return model, replace(names, ignorable=(*names.ignorable, *scheme.ignorable, *KV_SCALES))


def _held(path: Path, load_format: str) -> set[str]:
    return set() if load_format == "dummy" else set(read_headers(path))


def _architecture(hf: HfConfig) -> Any:
    name = hf.architecture()
    if name not in ARCHITECTURES:
        known = "served are " + ", ".join(ARCHITECTURES)
        raise hf.refuse("architectures", name, known)
    return import_module(f"headrace.models.{ARCHITECTURES[name]}")

"""The architectures that are served, and the way from a folder to a decoder."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace import quant
from headrace.comm import Place
from headrace.layers.build import Build
from headrace.models.decoder import Decoder
from headrace.models.fused import fuse
from headrace.models.hf import HfConfig
from headrace.models.spec import LocalSpec, ModelSpec
from headrace.ops import select
from headrace.ops.base import Yes
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


def begin_loading(
    path: Path,
    *,
    device: Device,
    dtype: torch.dtype,
    rank: int,
    ranks: int,
    load_format: str,
) -> Loading | None:
    """Has threads read this rank's share of the weights while the caller prepares the rest.

    Returns None where memory of the device is memory of the host: there `load_model` reads, and
    nothing is gained by copying twice.
    """
    if not device.asynchronous:
        return None
    hf = HfConfig.read(path)
    architecture = _architecture(hf)
    spec: ModelSpec = architecture.spec(hf)
    # What is read depends on neither the operations nor the other ranks: stand-ins will do.
    table = select(spec.op_spec(dtype, ranks), device, reference=True)
    build = Build(table, Place(rank, ranks), dtype, quant.detect(hf.values))
    outline = Decoder(build, spec, architecture.RECIPE)
    names = _names(architecture, spec)
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
    loading: Loading | None = None,
    phases: Phases | None = None,
) -> Decoder:
    """Builds the decoder of a folder and fills it with this rank's share of the weights.

    Args:
        dtype: of activations and weights, whatever the checkpoint is stored in.
        ops: by `ops.select(spec.op_spec(dtype, comm.size), device)`.
        load_format: `auto` reads safetensors, `dummy` makes deterministic random weights.
        loading: what `begin_loading` returned, if it was called.
        phases: measures building, reading and packing.
    """
    phases = phases or Phases()
    hf = HfConfig.read(path)
    architecture = _architecture(hf)
    spec: ModelSpec = architecture.spec(hf)
    spec.local(comm.size)  # Refuses what does not divide before anything is built.
    with phases("model"):
        build = Build(ops, comm, dtype, quant.detect(hf.values))
        model = Decoder(build, spec, architecture.RECIPE)
        names = _names(architecture, spec)
        wants = list_wants(model, names)
    loading = loading or begin_loading(
        path, device=device, dtype=dtype, rank=comm.rank, ranks=comm.size, load_format=load_format
    )
    with phases("weights"):
        if loading is not None:
            assert loading.wants == wants, "the weights that were read are another model's"
            assign(model, wants, loading.wait())
            phases.beside("reading weights", loading.seconds())
        else:
            reader: Reader = DummyReader() if load_format == "dummy" else SafetensorsReader(path)
            assign(model, wants, read_wants(wants, names, reader))
    with phases("pack"):
        pack(model, device.torch_device)
        answer = fuse(model, comm.size)
    one_call = isinstance(answer, Yes)
    model.step_choice = f"{'one native call' if one_call else 'by operation'}: {answer.why}"
    return model.eval()


def outline_model(
    hf: HfConfig, *, device: Device, dtype: torch.dtype, comm: Comm, ops: OpTable
) -> Decoder:
    """Builds a rank's decoder without weights, for a device without memory.

    It has a layer of every kind that the model has, and the first: more would launch nothing that
    these do not.
    """
    architecture = _architecture(hf)
    spec: ModelSpec = architecture.spec(hf)
    windows = spec.windows[:1] + tuple(dict.fromkeys(spec.windows[1:]))
    spec = replace(spec, layers=len(windows), windows=windows)
    model = Decoder(Build(ops, comm, dtype, quant.detect(hf.values)), spec, architecture.RECIPE)
    pack(model, device.torch_device)
    return model.eval()


def _names(architecture: Any, spec: ModelSpec) -> Names:
    return architecture.NAMES.tie() if spec.tied else architecture.NAMES


def _architecture(hf: HfConfig) -> Any:
    name = hf.architecture()
    if name not in ARCHITECTURES:
        known = "served are " + ", ".join(ARCHITECTURES)
        raise hf.refuse("architectures", name, known)
    return import_module(f"headrace.models.{ARCHITECTURES[name]}")

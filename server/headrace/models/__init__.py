"""The architectures that are served, and the way from a folder to a decoder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headrace import quant
from headrace.layers.build import Build
from headrace.models.decoder import Decoder
from headrace.models.fused import fuse
from headrace.models.hf import HfConfig
from headrace.models.spec import LocalSpec, ModelSpec
from headrace.ops.base import Yes
from headrace.weights import DummyReader, Reader, SafetensorsReader, load

if TYPE_CHECKING:
    from headrace.layers.build import Comm, Device
    from headrace.ops import OpTable

__all__ = ["ARCHITECTURES", "Decoder", "LocalSpec", "ModelSpec", "load_model", "read_spec"]

# `architectures[0]` of config.json → the module that describes it.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def read_spec(path: Path) -> ModelSpec:
    """Reads the facts of the model in a folder; a ConfigError says what is not served."""
    hf = HfConfig.read(path)
    return _architecture(hf).spec(hf)


def load_model(
    path: Path,
    *,
    device: Device,
    dtype: torch.dtype,
    comm: Comm,
    ops: OpTable,
    load_format: str,
) -> Decoder:
    """Builds the decoder of a folder and fills it with this rank's share of the weights.

    Args:
        dtype: of activations and weights, whatever the checkpoint is stored in.
        ops: by `ops.select(spec.op_spec(dtype, comm.size), device)`.
        load_format: `auto` reads safetensors, `dummy` makes deterministic random weights.
    """
    hf = HfConfig.read(path)
    architecture = _architecture(hf)
    spec: ModelSpec = architecture.spec(hf)
    spec.local(comm.size)  # Refuses what does not divide before anything is built.
    build = Build(ops, comm, dtype, quant.detect(hf.values))
    reader: Reader = DummyReader() if load_format == "dummy" else SafetensorsReader(path)
    model = Decoder(build, spec, architecture.RECIPE)
    load(
        model,
        architecture.NAMES.tie() if spec.tied else architecture.NAMES,
        reader,
        device.torch_device,
    )
    answer = fuse(model, comm.size)
    one_call = isinstance(answer, Yes)
    model.step_choice = f"{'one native call' if one_call else 'by operation'}: {answer.why}"
    return model.eval()


def _architecture(hf: HfConfig) -> Any:
    name = hf.architecture()
    if name not in ARCHITECTURES:
        known = "served are " + ", ".join(ARCHITECTURES)
        raise hf.refuse("architectures", name, known)
    return import_module(f"headrace.models.{ARCHITECTURES[name]}")

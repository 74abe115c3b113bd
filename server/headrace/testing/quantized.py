"""Tiny checkpoints in every quantized format, each beside the checkpoint of what it dequantizes to.

Weights are rounded and packed here in the most obvious way, number by number as the formats say.
"""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.testing.tiny import Tiny

FP8 = torch.float8_e4m3fn
# What a layer is stored as, by the ends of its tensors' names, and the weight that means.
Stored = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Stored16:
    """A way to store a checkpoint of 16 or 32 bits again.

    Attributes:
        settings: the checkpoint's `quantization_config`.
        store: from a weight [Y, X] to what is stored.
    """

    settings: dict[str, Any]
    store: Callable[[Tensor], Stored]


def words(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Packs integers along a dimension, the first into the lowest bits of an int32."""
    codes = codes.long().movedim(dim, -1).unflatten(-1, (-1, 32 // bits))
    packed = sum(codes[..., i] << bits * i for i in range(32 // bits))
    assert isinstance(packed, Tensor)
    packed = torch.where(packed >= 1 << 31, packed - (1 << 32), packed)
    return packed.to(torch.int32).movedim(-1, dim).contiguous()


@dataclass(frozen=True)
class Rounded:
    """Integers with a scale and a zero point a group."""

    codes_YX: Tensor
    scales_YG: Tensor
    zeros_YG: Tensor
    group_of_X: Tensor

    def weight(self) -> Tensor:
        zeros_YX, scales_YX = self.zeros_YG[:, self.group_of_X], self.scales_YG[:, self.group_of_X]
        return (self.codes_YX - zeros_YX) * scales_YX


def rounded(
    weight_YX: Tensor, bits: int, group: int, symmetric: bool, shuffled: bool = False
) -> Rounded:
    """Rounds to the nearest integers; `shuffled` takes the groups' members in a random order."""
    outputs, inputs = weight_YX.shape
    group = inputs if group == -1 else group
    order = torch.arange(inputs)
    if shuffled:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
    group_of_X = torch.empty(inputs, dtype=torch.long)
    group_of_X[order] = torch.arange(inputs) // group
    groups, most = -(-inputs // group), (1 << bits) - 1
    scales_YG, zeros_YG = torch.empty(outputs, groups), torch.empty(outputs, groups)
    for g in range(groups):
        members = weight_YX[:, group_of_X == g].float()
        low, high = members.amin(1).clamp(max=0), members.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            scales_YG[:, g], zeros_YG[:, g] = high * 2 / most, (most + 1) // 2
        else:
            scales_YG[:, g] = (high - low) / most
            zeros_YG[:, g] = (-low / scales_YG[:, g]).round().clamp(1, most)
    scales_YG = scales_YG.half().float()
    codes = weight_YX.float() / scales_YG[:, group_of_X] + zeros_YG[:, group_of_X]
    return Rounded(codes.round().clamp(0, most), scales_YG, zeros_YG, group_of_X)


def _gptq(bits: int, group: int, symmetric: bool, desc_act: bool, version: int = 1) -> Stored16:
    settings = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": desc_act,
    }
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"

    def store(weight_YX: Tensor) -> Stored:
        made = rounded(weight_YX, bits, group, symmetric, desc_act)
        tensors = {
            "qweight": words(made.codes_YX.T, bits, 0),
            "qzeros": words(made.zeros_YG.T - (2 - version), bits, 1),
            "scales": made.scales_YG.T.half().contiguous(),
            "g_idx": made.group_of_X.to(torch.int32),
            "bias": torch.zeros(weight_YX.shape[0], dtype=torch.float16),
        }
        return tensors, made.weight()

    return Stored16(settings, store)


def _awq() -> Stored16:
    places = [0, 2, 4, 6, 1, 3, 5, 7]

    def places_of(codes_AY: Tensor) -> Tensor:
        return codes_AY.unflatten(1, (-1, 8))[..., places].flatten(1)

    def store(weight_YX: Tensor) -> Stored:
        made = rounded(weight_YX, 4, 32, symmetric=False)
        tensors = {
            "qweight": words(places_of(made.codes_YX.T), 4, 1),
            "qzeros": words(places_of(made.zeros_YG.T), 4, 1),
            "scales": made.scales_YG.T.half().contiguous(),
        }
        return tensors, made.weight()

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    return Stored16(settings, store)


def _compressed(
    form: str, weights: dict[str, Any], activations: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _packed(bits: int, group: int, symmetric: bool, ordered: bool = False) -> Stored16:
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "symmetric": symmetric,
        "actorder": "group" if ordered else None,
    }

    def store(weight_YX: Tensor) -> Stored:
        made = rounded(weight_YX, bits, group, symmetric, ordered)
        tensors = {
            "weight_packed": words(made.codes_YX, bits, 1),
            "weight_scale": made.scales_YG.half(),
            "weight_shape": torch.tensor(weight_YX.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(made.zeros_YG, bits, 0)
        if ordered:
            tensors["weight_g_idx"] = made.group_of_X.to(torch.int32)
        return tensors, made.weight()

    return Stored16(_compressed("pack-quantized", weights, None), store)


def _int8() -> Stored16:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    dynamic = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}

    def store(weight_YX: Tensor) -> Stored:
        scales_Y1 = weight_YX.float().abs().amax(1, keepdim=True) / 127
        codes_YX = (weight_YX.float() / scales_Y1).round()
        tensors = {"weight": codes_YX.to(torch.int8), "weight_scale": scales_Y1}
        return tensors, codes_YX * scales_Y1

    return Stored16(_compressed("int-quantized", weights, dynamic), store)


def _to_fp8(weight: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(dims, keepdim=True) / torch.finfo(FP8).max
    return (weight.float() / scale).to(FP8), scale


def _fp8_channel(settings: dict[str, Any]) -> Stored16:
    def store(weight_YX: Tensor) -> Stored:
        codes, scale_Y1 = _to_fp8(weight_YX, (1,))
        return {"weight": codes, "weight_scale": scale_Y1}, codes.float() * scale_Y1

    return Stored16(settings, store)


def _fp8_tensor(settings: dict[str, Any], static: bool, shape: tuple[int, ...]) -> Stored16:
    def store(weight_YX: Tensor) -> Stored:
        codes, scale_11 = _to_fp8(weight_YX, (0, 1))
        tensors = {"weight": codes, "weight_scale": scale_11.view(shape)}
        if static:
            tensors["input_scale"] = torch.tensor(0.5).view(shape)
        return tensors, codes.float() * scale_11

    return Stored16(settings, store)


def _fp8_block() -> Stored16:
    size = 32
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [size, size],
        "modules_to_not_convert": ["lm_head"],
    }

    def store(weight_YX: Tensor) -> Stored:
        outputs, inputs = weight_YX.shape
        codes = torch.empty(weight_YX.shape, dtype=FP8)
        dequantized = torch.empty(weight_YX.shape)
        scales = torch.empty(-(-outputs // size), -(-inputs // size))
        for row in range(0, outputs, size):
            for column in range(0, inputs, size):
                block = slice(row, row + size), slice(column, column + size)
                codes[block], scale_11 = _to_fp8(weight_YX[block], (0, 1))
                dequantized[block] = codes[block].float() * scale_11
                scales[row // size, column // size] = scale_11[0, 0]
        return {"weight": codes, "weight_scale_inv": scales}, dequantized

    return Stored16(settings, store)


_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FORMATS = {
    "gptq": _gptq(4, 32, True, False),
    "gptq-asymmetric": _gptq(4, 32, False, False),
    "gptq-v2": _gptq(4, 64, False, False, version=2),
    "gptq-8": _gptq(8, 32, False, False),
    "gptq-whole": _gptq(4, -1, True, False),
    "gptq-ordered": _gptq(4, 32, False, True),
    "gptq-8-ordered": _gptq(8, 32, True, True),
    "awq": _awq(),
    "w4a16": _packed(4, 32, True),
    "w4a16-asymmetric": _packed(4, 32, False),
    "w4a16-ordered": _packed(4, 32, True, ordered=True),
    "w8a16": _packed(8, -1, True),
    "w8a8": _int8(),
    "fp8-tensor": _fp8_tensor({"quant_method": "fp8", "activation_scheme": "static"}, True, ()),
    "fp8-block": _fp8_block(),
    "fbgemm-fp8": _fp8_channel({"quant_method": "fbgemm_fp8"}),
    "compressed-fp8": _fp8_channel(
        _compressed("float-quantized", {**_FLOAT8, "strategy": "channel"}, {"dynamic": True})
    ),
    "compressed-fp8-static": _fp8_tensor(
        _compressed("float-quantized", {**_FLOAT8, "strategy": "tensor"}, {"dynamic": False}),
        True,
        (1,),
    ),
}
# Divides by two with all of the groups above.
TINY = Tiny(mlp_width=128, kv_heads=4)


def write(name: str, folder: Path, tiny: Tiny = TINY) -> tuple[Path, Path]:
    """Writes a checkpoint in a format and the one of what that dequantizes to, in float32.

    Returns: the folders of both.
    """
    form = FORMATS[name]
    plain = tiny.write(folder / "plain")
    quantized = tiny.write(folder / name)
    tensors = load_file(plain / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for tensor, value in tensors.items():
        module, _, leaf = tensor.rpartition(".")
        if not module.endswith("_proj") or leaf != "weight":
            stored[tensor] = value
            continue
        parts, dequantized = form.store(value)
        if f"{module}.bias" in tensors:
            parts.pop("bias", None)
        stored |= {f"{module}.{part}": of.contiguous() for part, of in parts.items()}
        tensors[tensor] = dequantized.float().contiguous()
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    path = quantized / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "quantization_config": form.settings}), encoding="utf-8")
    return quantized, plain

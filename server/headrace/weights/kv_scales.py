"""The scales that a checkpoint brings for a KV cache in eight bits."""

from __future__ import annotations

import math
from pathlib import Path

from headrace.errors import CheckpointError
from headrace.weights.names import Names
from headrace.weights.reader import SafetensorsReader

# Tensors that say nothing where the cache has the model's dtype.
IGNORABLE = (r".*\.self_attn\.(k|v|kv)_scale", r".*\.[kv]_proj\.(output_scale|k_scale|v_scale)")


def read_kv_scales(folder: Path, names: Names, layers: int) -> list[tuple[float, float] | None]:
    """Returns what keys and values of each layer are divided by before they are kept.

    Of the spellings that quantizers use the first that is there counts.

    Returns: of each layer; None where the checkpoint does not say of both.

    Raises:
        CheckpointError: a scale is more than one number, or not positive and finite.
    """
    reader = SafetensorsReader(folder)
    held = reader.names()
    scales: list[tuple[float, float] | None] = []
    for layer in range(layers):
        of_layer = f"blocks.{layer}.attention"
        attention = names.modules_of(f"{of_layer}.out")[0].rpartition(".")[0]
        _, *projections = names.modules_of(f"{of_layer}.qkv")
        found: list[float] = []
        for kind, projection in zip("kv", projections, strict=True):
            spellings = (
                f"{attention}.{kind}_scale",
                f"{projection}.{kind}_scale",
                f"{projection}.output_scale",
                f"{attention}.kv_scale",
            )
            name = next((name for name in spellings if name in held), None)
            if name is not None:
                found.append(_number(reader, name))
        scales.append((found[0], found[1]) if len(found) == 2 else None)
    return scales


def _number(reader: SafetensorsReader, name: str) -> float:
    scale = float(reader.read(name, (1,), 0, 0, 1))
    if not (math.isfinite(scale) and scale > 0):
        where = f"{reader.where(name)}: {name}"
        raise CheckpointError(f"{where} is {scale}; a scale of the KV cache is positive")
    return scale

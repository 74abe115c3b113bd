"""Quantisation formats: how linear layers are stored, and which op runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import ConfigError
from headrace.quant.base import LinearMethod, LinearShape, QuantFormat
from headrace.quant.none import Plain
from headrace.quant.parameter import Declares, Part, Split

__all__ = [
    "Declares",
    "LinearMethod",
    "LinearShape",
    "Part",
    "QuantFormat",
    "Split",
    "detect",
]


def detect(config: Mapping[str, Any]) -> QuantFormat:
    """Returns the format of a checkpoint by its `config.json`; refuses unknown ones by name."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return Plain()
    method = quantization.get("quant_method", "unnamed")
    raise ConfigError(
        f"config.json: quantization_config.quant_method is {method!r}; "
        "only checkpoints that are not quantized can be served"
    )

"""Where quantizers write their settings, other than `quantization_config` of `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError

# AutoGPTQ's and AutoAWQ's own files, and what their keys are called in `config.json`.
_FILES = {
    "quantize_config.json": {},
    "quant_config.json": {"w_bit": "bits", "q_group_size": "group_size"},
}


def with_settings(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of `config.json`; what another file has to say of how the checkpoint is
    quantized stands in `quantization_config`, where `config.json` has none."""
    if values.get("quantization_config") is not None:
        return values
    if values.get("compression_config") is not None:
        return {**values, "quantization_config": values["compression_config"]}
    for name, keys in _FILES.items():
        path = folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path} is not a JSON object")
        settings = {keys.get(key, key): value for key, value in found.items()}
        is_awq = name == "quant_config.json" or str(found.get("version")).lower() == "gemm"
        settings.setdefault("quant_method", "awq" if is_awq else "gptq")
        return {**values, "quantization_config": settings}
    return values

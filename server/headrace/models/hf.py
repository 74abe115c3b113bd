"""Reading `config.json`, in the spelling of transformers 4 and in that of 5."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from headrace.errors import ConfigError
from headrace.layers.rotary import LinearScaling, Llama3Scaling, RopeSpec, YarnScaling
from headrace.quantizers import with_settings

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class HfConfig:
    """The values of one `config.json`; every error names the file and the key."""

    def __init__(self, values: dict[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    @classmethod
    def read(cls, folder: Path) -> HfConfig:
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{folder} holds no config.json: is it a model?") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is not a JSON object")
        return cls(with_settings(folder, values), str(path))

    def refuse(self, key: str, found: object, wanted: str) -> ConfigError:
        """Makes the error for a value that is not served."""
        return ConfigError(f"{self.where}: {key} is {found!r}; {wanted}")

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive finite number; null counts as absent."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, value, "expected a number")
        if not math.isfinite(value) or value <= 0:
            raise self.refuse(key, value, "expected a number above zero")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer; null counts as absent."""
        value = self.number(key, default)
        if value != int(value):
            raise self.refuse(key, value, "expected an integer")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, value, "expected true or false")
        return value

    def architecture(self) -> str:
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names:
            raise ConfigError(f"{self.where}: architectures is missing or empty")
        return str(names[0])

    def dtype(self) -> torch.dtype:
        """Returns what the checkpoint is said to be stored in; float32 if nothing is said."""
        name = self.values.get("dtype") or self.values.get("torch_dtype") or "float32"
        if name not in _DTYPES:
            raise self.refuse("dtype", name, f"expected one of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def expect(self, key: str, wanted: object) -> None:
        """Refuses any value but the one that is computed; absent is fine."""
        value = self.values.get(key)
        if value is not None and value != wanted:
            raise self.refuse(key, value, f"only {wanted!r} can be served")

    def windows(self, layers: int, window: int) -> tuple[int, ...]:
        """Returns the window of each layer (0: none), where `window` is that of sliding layers."""
        types = self.values.get("layer_types")
        if types is None:
            first = self.values.get("max_window_layers") or 0
            return tuple(window if layer >= first else 0 for layer in range(layers))
        known = {"full_attention": 0, "sliding_attention": window}
        if len(types) != layers or any(kind not in known for kind in types):
            wanted = f"expected {layers} of {' or '.join(known)}"
            raise self.refuse("layer_types", types, wanted)
        return tuple(known[kind] for kind in types)

    def rope(self, head_dim: int) -> RopeSpec:
        """Returns how positions are encoded."""
        key = "rope_parameters" if self.values.get("rope_parameters") else "rope_scaling"
        given = self.values.get(key) or {}
        if not isinstance(given, dict):
            raise self.refuse(key, given, "expected an object")
        if given.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.refuse(
                f"{key}.partial_rotary_factor",
                given["partial_rotary_factor"],
                "only 1 can be served",
            )
        rope = HfConfig(given, f"{self.where}: {key}")
        theta = rope.number("rope_theta", self.number("rope_theta", 10000.0))
        kind = given.get("rope_type", given.get("type", "default"))
        return RopeSpec(head_dim, theta, _scaling(rope, kind, self))


def _scaling(
    rope: HfConfig, kind: str, config: HfConfig
) -> Llama3Scaling | LinearScaling | YarnScaling | None:
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(rope.number("factor"))
        case "llama3":
            return Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_tokens=rope.integer("original_max_position_embeddings"),
            )
        case "yarn":
            return _yarn(rope, config)
        case _:
            known = "default, linear, llama3 and yarn can be served"
            raise rope.refuse("rope_type", kind, known)


def _yarn(rope: HfConfig, config: HfConfig) -> YarnScaling:
    factor = rope.number("factor")

    def sharpness(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    both = rope.values.get("mscale") and rope.values.get("mscale_all_dim")
    scales = (rope.number("mscale"), rope.number("mscale_all_dim")) if both else (1.0, 0.0)
    sharpest = sharpness(scales[0]) / sharpness(scales[1])
    original = config.integer("max_position_embeddings")
    return YarnScaling(
        factor=factor,
        original_tokens=rope.integer("original_max_position_embeddings", original),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.number("attention_factor", sharpest),
        truncate=rope.flag("truncate", True),
    )

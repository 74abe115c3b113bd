"""How a checkpoint is quantized, by its `config.json`, and what the user asks for beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from headrace.errors import ConfigError
from headrace.ops.quant_matmul.base import Kind
from headrace.quant.awq import Awq
from headrace.quant.base import QuantFormat, Scheme
from headrace.quant.compressed import Int8, PackedIntegers
from headrace.quant.fp8 import Fp8
from headrace.quant.gptq import Gptq
from headrace.quant.on_load import KINDS, OnLoad

# What `--quantize` calls formats that a checkpoint of 16 bits can be given when it is loaded.
ON_LOAD = {
    "fp8": "fp8",
    "eetq": "int8",
    "bitsandbytes": "int8",
    "bitsandbytes-nf4": "nf4",
    "bitsandbytes-fp4": "fp4",
}
# Formats that only a checkpoint can have.
STORED = ("gptq", "awq", "compressed-tensors", "fp8")
GROUPS = (-1, 32, 64, 128)
_LOADABLE = "--quantize fp8, eetq, bitsandbytes, bitsandbytes-nf4 or bitsandbytes-fp4"

PLAIN = Scheme("none", lambda module: None, frozenset())
# Of the KV cache, which has the model's dtype, and what follows from others.
_CACHE_SCALES = (
    r".*\.self_attn\.(q|k|v|prob|kv)_scale",
    r".*\.[kv]_proj\.(output_scale|k_scale|v_scale)",
)


def detect(config: Mapping[str, Any], asked: str = "") -> Scheme:
    """Returns how the layers of a checkpoint are stored; a ConfigError says what cannot be served.

    Args:
        config: of `config.json`, with the settings of other files that quantizers write.
        asked: the value of `--quantize`; empty: whatever the checkpoint is.
    """
    settings = config.get("quantization_config")
    if settings is None:
        return _on_load(asked)
    if not isinstance(settings, Mapping):
        raise ConfigError(f"config.json: quantization_config is {settings!r}, not an object")
    method = settings.get("quant_method")
    readers = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed,
        "fp8": _fp8,
        "fbgemm_fp8": _fbgemm_fp8,
    }
    if method not in readers:
        raise _refuse("quant_method", method, f"{', '.join(readers)} can be served")
    scheme = readers[method](Settings(settings))
    if asked not in ("", scheme.name):
        raise ConfigError(
            f"--quantize {asked}: the checkpoint is quantized already, as {scheme.name}; start "
            "without the flag"
        )
    return scheme


def _on_load(asked: str) -> Scheme:
    if asked == "":
        return PLAIN
    if asked in ON_LOAD:
        layer = OnLoad(ON_LOAD[asked])
        kinds = frozenset([KINDS[layer.name]])
        return Scheme(asked, lambda module: layer, kinds, on_load=True)
    if asked in STORED:
        raise ConfigError(
            f"--quantize {asked}: the checkpoint is not quantized; take one that is, or make one "
            f"with `headrace quantize`, or quantize it on load with {_LOADABLE}"
        )
    raise ConfigError(
        f"--quantize {asked} is not served; take a checkpoint in the format of "
        f"{', '.join(STORED)}, or quantize one of 16 bits on load with {_LOADABLE}"
    )


def _refuse(key: str, found: object, wanted: str) -> ConfigError:
    return ConfigError(f"config.json: quantization_config.{key} is {found!r}; {wanted}")


class Settings:
    """The values of `quantization_config`; every error names the key."""

    def __init__(self, values: Mapping[str, Any], at: str = "") -> None:
        self.values = values
        self._at = at

    def refuse(self, key: str, wanted: str) -> ConfigError:
        return _refuse(self._at + key, self.values.get(key), wanted)

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """Returns a value that must be one of a few; absent and null are the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise self.refuse(key, f"served are {', '.join(map(str, allowed))}")
        return value

    def names(self, key: str) -> list[str]:
        """Returns a list of strings; absent and null are empty."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.refuse(key, "expected a list of names")
        return value

    def section(self, key: str) -> Settings | None:
        """Returns an object within; None where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(key, "expected an object")
        return Settings(value, f"{self._at}{key}.")


def _but(
    excluded: list[str], layer: QuantFormat, matches: Callable[[str, str], bool]
) -> Callable[[str], QuantFormat | None]:
    """Every module has the format but those that one of the names matches."""

    def of(module: str) -> QuantFormat | None:
        return None if any(matches(name, module) for name in excluded) else layer

    return of


def _within(name: str, module: str) -> bool:
    """Whether a name of `modules_to_not_convert` means a module: it, or a part of its path."""
    return f".{name}." in f".{module}."


def _gptq(settings: Settings) -> Scheme:
    bits = settings.one_of("bits", (4, 8), 4)
    group = settings.one_of("group_size", GROUPS, -1)
    known = ("gptq", "gptq_v2")
    layer = Gptq(
        bits=bits,
        group=group,
        desc_act=settings.one_of("desc_act", (True, False), False),
        zeros_minus_one=settings.one_of("checkpoint_format", known, "gptq") == "gptq",
    )
    if settings.values.get("dynamic"):
        raise settings.refuse("dynamic", "only checkpoints whose layers are stored alike are read")
    ignorable = (r".*\.g_idx",) if not layer.desc_act else ()
    head = settings.one_of("lm_head", (True, False), False)
    of = _but(settings.names("modules_to_not_convert"), layer, _within)
    return Scheme("gptq", of, frozenset([layer.kind]), head, (*ignorable, *_CACHE_SCALES))


def _awq(settings: Settings) -> Scheme:
    settings.one_of("bits", (4,), 4)
    version = settings.values.get("version") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise settings.refuse("version", "only the layout gemm is served")
    layer = Awq(settings.one_of("group_size", GROUPS, 128))
    of = _but(settings.names("modules_to_not_convert"), layer, _within)
    return Scheme("awq", of, frozenset([Kind.INT4]), False, _CACHE_SCALES)


def _fp8(settings: Settings) -> Scheme:
    static = settings.one_of("activation_scheme", ("static", "dynamic"), "dynamic") == "static"
    settings.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    if settings.values.get("weight_block_size") is None:
        layer = Fp8("tensor", static=static)
    else:
        block = _block(settings, "weight_block_size")
        if static:
            raise settings.refuse("activation_scheme", "scales of blocks go with dynamic ones")
        layer = Fp8("block", block, "weight_scale_inv")
    excluded = settings.names("modules_to_not_convert") + settings.names("ignored_layers")
    of = _but(excluded, layer, _within)
    return Scheme("fp8", of, frozenset([Kind.FP8]), False, _CACHE_SCALES)


def _fbgemm_fp8(settings: Settings) -> Scheme:
    layer = Fp8("channel")
    of = _but(settings.names("modules_to_not_convert"), layer, _within)
    ignorable = (r".*\.input_scale_ub", *_CACHE_SCALES)
    return Scheme("fp8", of, frozenset([Kind.FP8]), False, ignorable)


def _block(settings: Settings, key: str) -> tuple[int, int]:
    block = settings.values.get(key)
    if not isinstance(block, list) or len(block) != 2:
        raise settings.refuse(key, "expected two multiples of 32, such as [128, 128]")
    if not all(type(n) is int and n > 0 and n % 32 == 0 for n in block):
        raise settings.refuse(key, "expected two multiples of 32, such as [128, 128]")
    return block[0], block[1]


# The values that a scheme of compressed-tensors may have, where they are not served.
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def _compressed(settings: Settings) -> Scheme:
    groups = settings.section("config_groups")
    if groups is None or not groups.values:
        raise settings.refuse("config_groups", "expected the groups of quantized layers")
    rules: list[tuple[list[str], QuantFormat, Kind]] = []
    symmetric = True
    for name in groups.values:
        group = groups.section(name)
        assert group is not None
        kind, layer = _compressed_layer(settings, group)
        symmetric = symmetric and getattr(layer, "symmetric", True)
        rules.append((group.names("targets") or ["Linear"], layer, kind))
    ignored = settings.names("ignore")

    def of(module: str) -> QuantFormat | None:
        if any(_targets(name, module) for name in ignored):
            return None
        found = (layer for names, layer, _ in rules if any(_targets(n, module) for n in names))
        return next(found, None)

    ignorable = (r".*\.weight_shape", r".*\.input_zero_point", *_CACHE_SCALES)
    if symmetric:
        ignorable = (*ignorable, r".*\.weight_zero_point")
    kinds = frozenset(kind for _, _, kind in rules)
    return Scheme("compressed-tensors", of, kinds, True, ignorable)


def _targets(name: str, module: str) -> bool:
    """Whether a name of `targets` or `ignore` means a linear module."""
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    return name in ("Linear", module)


def _compressed_layer(settings: Settings, group: Settings) -> tuple[Kind, QuantFormat]:
    weights = group.section("weights")
    if weights is None:
        raise group.refuse("weights", "expected how weights are quantized")
    named = group.values.get("format") or settings.values.get("format")
    if named not in _FORMATS:
        raise settings.refuse("format", f"served are {', '.join(_FORMATS)}")
    activations = group.section("input_activations")
    static = activations is not None and activations.values.get("dynamic") in (None, False)
    kind = weights.one_of("type", ("int", "float"), "int")
    strategies = ("tensor", "channel", "group") if kind == "int" else ("tensor", "channel", "block")
    grouped = weights.values.get("group_size") is not None
    strategy = weights.one_of("strategy", strategies, "group" if grouped else "channel")
    symmetric = weights.one_of("symmetric", (True, False), True)
    if kind == "float":
        weights.one_of("num_bits", (8,), 8)
        if strategy != "block":
            return Kind.FP8, Fp8(strategy, static=static)
        return Kind.FP8, Fp8("block", _block(weights, "block_structure"), static=static)
    bits = weights.one_of("num_bits", (4, 8), 8)
    if named != "pack-quantized":
        if bits != 8 or strategy == "group" or not symmetric:
            raise settings.refuse("format", "it goes with 8 bits, symmetric, a scale a channel")
        return Kind.INT8, Int8(strategy == "channel", static)
    if activations is not None:
        raise group.refuse("input_activations", "packed weights go with 16 bits")
    if strategy == "tensor":
        raise weights.refuse("strategy", "packed weights have scales of groups or channels")
    size = weights.one_of("group_size", GROUPS, -1) if strategy == "group" else -1
    ordered = weights.values.get("actorder") == "group"
    kinds = Kind.INT4 if bits == 4 else Kind.INT8
    return kinds, PackedIntegers(bits, size, symmetric, ordered)

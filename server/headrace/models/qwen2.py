"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and windows on late layers."""

from headrace.models import llama
from headrace.models.hf import HfConfig
from headrace.models.spec import Differences, ModelSpec, dense_spec

RECIPE = llama.RECIPE
NAMES = llama.NAMES


def window(hf: HfConfig) -> int:
    """Returns the window of the layers that slide; checkpoints state one that they do not use."""
    if not hf.flag("use_sliding_window") or hf.values.get("sliding_window") is None:
        return 0
    return hf.integer("sliding_window")


def spec(hf: HfConfig) -> ModelSpec:
    """Reads config.json; refuses what this file does not compute."""
    return dense_spec(hf, Differences(qkv_bias=True, window=window(hf)))

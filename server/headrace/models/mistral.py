"""Mistral: Llama with a sliding window, which the first version uses on all layers."""

from headrace.models import llama
from headrace.models.hf import HfConfig
from headrace.models.spec import Differences, ModelSpec, dense_spec

RECIPE = llama.RECIPE
NAMES = llama.NAMES


def spec(hf: HfConfig) -> ModelSpec:
    """Reads config.json; refuses what this file does not compute."""
    window = 0 if hf.values.get("sliding_window") is None else hf.integer("sliding_window")
    return dense_spec(hf, Differences(window=window))

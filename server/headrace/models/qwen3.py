"""Qwen3: Llama with normalised queries and keys."""

from headrace.models import llama, qwen2
from headrace.models.hf import HfConfig
from headrace.models.spec import Differences, ModelSpec, dense_spec

RECIPE = llama.RECIPE
NAMES = llama.NAMES.plus(
    modules={"blocks.{}.attention.qk_norm": ("model.layers.{}.self_attn",)},
    leaves={"q": "q_norm.weight", "k": "k_norm.weight"},
)


def spec(hf: HfConfig) -> ModelSpec:
    """Reads config.json; refuses what this file does not compute."""
    bias = hf.flag("attention_bias")
    return dense_spec(
        hf, Differences(qkv_bias=bias, out_bias=bias, qk_norm=True, window=qwen2.window(hf))
    )

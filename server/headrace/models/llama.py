"""Llama (1 to 3), and the many models that are Llamas by another name."""

from headrace.models.decoder import Recipe
from headrace.models.hf import HfConfig
from headrace.models.spec import Differences, ModelSpec, dense_spec
from headrace.weights import Names

RECIPE = Recipe()
NAMES = Names(
    modules={
        "embed": ("model.embed_tokens",),
        "blocks.{}.attention_norm": ("model.layers.{}.input_layernorm",),
        "blocks.{}.attention.qkv": (
            "model.layers.{}.self_attn.q_proj",
            "model.layers.{}.self_attn.k_proj",
            "model.layers.{}.self_attn.v_proj",
        ),
        "blocks.{}.attention.out": ("model.layers.{}.self_attn.o_proj",),
        "blocks.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm",),
        "blocks.{}.mlp.gate_up": (
            "model.layers.{}.mlp.gate_proj",
            "model.layers.{}.mlp.up_proj",
        ),
        "blocks.{}.mlp.down": ("model.layers.{}.mlp.down_proj",),
        "norm": ("model.norm",),
        "head": ("lm_head",),
    },
    # Angles that old checkpoints store although they follow from the config.
    ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)


def spec(hf: HfConfig) -> ModelSpec:
    """Reads config.json; refuses what this file does not compute."""
    bias = hf.flag("attention_bias")
    return dense_spec(hf, Differences(qkv_bias=bias, out_bias=bias, mlp_bias=hf.flag("mlp_bias")))

"""Tiny random checkpoints of every served architecture, laid out like a folder of the Hub."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What each architecture's config.json says beyond what all say.
EXTRA: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "attention_bias": False, "mlp_bias": False},
    "MistralForCausalLM": {"model_type": "mistral", "sliding_window": None},
    "Qwen2ForCausalLM": {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 1,
    },
    "Qwen3ForCausalLM": {
        "model_type": "qwen3",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 1,
        "attention_bias": False,
    },
}


@dataclass(frozen=True)
class Tiny:
    """The sizes of a tiny checkpoint. The vocabulary is odd, so that every division pads it."""

    architecture: str = "LlamaForCausalLM"
    layers: int = 3
    width: int = 64
    mlp_width: int = 96
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 509
    tied: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0
    spelling: int = 5  # the major version of transformers whose config.json it is
    shards: int = 1  # files the weights are written to
    config: dict[str, Any] = field(default_factory=dict[str, Any])  # over everything else

    def write(self, folder: Path) -> Path:
        """Writes config, weights, tokenizer and chat template; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.hf_config()
        _write_json(folder / "config.json", config)
        self._write_weights(folder, config)
        write_tokenizer(folder, self.vocab_size)
        _write_json(
            folder / "generation_config.json",
            {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        )
        return folder

    def hf_config(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        dtype = str(self.dtype).removeprefix("torch.")
        config: dict[str, Any] = {
            "architectures": [self.architecture],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.02,
            "intermediate_size": self.mlp_width,
            "max_position_embeddings": 2048,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "use_cache": True,
            "vocab_size": self.vocab_size,
            **EXTRA[self.architecture],
        }
        if self.spelling == 5:
            config["dtype"] = dtype
            config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
        else:
            config |= {"torch_dtype": dtype, "rope_theta": 10000.0, "rope_scaling": None}
        return config | self.config

    def _write_weights(self, folder: Path, config: dict[str, Any]) -> None:
        tensors = self._tensors(config)
        if self.shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            return
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for shard in range(self.shards):
            file = f"model-{shard + 1:05}-of-{self.shards:05}.safetensors"
            part = {name: tensors[name] for name in names[shard :: self.shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)

    def _tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        tensors: dict[str, Tensor] = {}

        def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
            weight = torch.randn(rows, columns, generator=random) * columns**-0.5
            tensors[f"{name}.weight"] = weight.to(self.dtype)
            if bias:
                offset = torch.randn(rows, generator=random) * 0.5
                tensors[f"{name}.bias"] = offset.to(self.dtype)

        def norm(name: str, size: int) -> None:
            scale = 1 + 0.2 * torch.randn(size, generator=random)
            tensors[f"{name}.weight"] = scale.to(self.dtype)

        qwen2 = self.architecture == "Qwen2ForCausalLM"
        attention_bias = bool(config.get("attention_bias"))
        mlp_bias = bool(config.get("mlp_bias"))
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrix("model.embed_tokens", self.vocab_size, self.width)
        # Rows of unit norm would vanish beside what the blocks add.
        tensors["model.embed_tokens.weight"] *= self.width**0.5
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            norm(f"{at}.input_layernorm", self.width)
            matrix(f"{at}.self_attn.q_proj", q, self.width, qwen2 or attention_bias)
            matrix(f"{at}.self_attn.k_proj", kv, self.width, qwen2 or attention_bias)
            matrix(f"{at}.self_attn.v_proj", kv, self.width, qwen2 or attention_bias)
            matrix(f"{at}.self_attn.o_proj", self.width, q, attention_bias)
            if self.architecture == "Qwen3ForCausalLM":
                norm(f"{at}.self_attn.q_norm", self.head_dim)
                norm(f"{at}.self_attn.k_norm", self.head_dim)
            norm(f"{at}.post_attention_layernorm", self.width)
            matrix(f"{at}.mlp.gate_proj", self.mlp_width, self.width, mlp_bias)
            matrix(f"{at}.mlp.up_proj", self.mlp_width, self.width, mlp_bias)
            matrix(f"{at}.mlp.down_proj", self.width, self.mlp_width, mlp_bias)
        norm("model.norm", self.width)
        if not self.tied:
            matrix("lm_head", self.vocab_size, self.width)
        return tensors


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a byte-level BPE tokenizer in which every id below `vocab_size` is a token.

    The ids are the special tokens, the 256 bytes, and as many pairs of letters as still fit.
    """
    pieces = [*SPECIALS, *_byte_letters()]
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    merges = [(a, b) for a in letters for b in letters][: vocab_size - len(pieces)]
    pieces += [a + b for a, b in merges]
    if len(pieces) != vocab_size:
        raise ValueError(f"a tiny vocabulary has 259 to {259 + 26 * 26} tokens, not {vocab_size}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id_,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id_, content in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: id_ for id_, piece in enumerate(pieces)},
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _byte_letters() -> list[str]:
    """Returns the printable letter that stands for each byte in byte-level vocabularies."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

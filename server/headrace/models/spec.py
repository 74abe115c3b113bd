"""The facts of a model, as its `config.json` states them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headrace.layers.attention import AttentionSpec
from headrace.layers.build import even, kv_share, vocab_share
from headrace.layers.rotary import LinearScaling, RopeSpec, YarnScaling
from headrace.models.hf import HfConfig
from headrace.ops import OpSpec
from headrace.quant import PLAIN, Scheme


@dataclass(frozen=True)
class LocalSpec:
    """One rank's share of a model's sizes."""

    heads: int
    kv_heads: int  # at least one: ranks beyond the number of KV heads replicate them
    mlp_width: int
    vocab_size: int  # padded


@dataclass(frozen=True)
class ModelSpec:
    """What a dense decoder is made of, before it is divided over ranks."""

    architecture: str
    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_tokens_max: int
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int, ...]  # of each layer: positions a token sees, its own included; 0: all
    tied: bool  # the head's weight is the embedding's
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    checkpoint_dtype: torch.dtype

    def local(self, ranks: int) -> LocalSpec:
        """Returns the share of each of `ranks`; a ConfigError names what does not divide."""
        return LocalSpec(
            heads=even(self.heads, ranks, "attention heads"),
            kv_heads=kv_share(self.kv_heads, ranks),
            mlp_width=even(self.mlp_width, ranks, "columns of the MLP (intermediate_size)"),
            vocab_size=vocab_share(self.vocab_size, ranks),
        )

    def op_spec(
        self,
        dtype: torch.dtype,
        ranks: int,
        scheme: Scheme = PLAIN,
        kv_dtype: torch.dtype | None = None,
        rows8: bool = False,
    ) -> OpSpec:
        """Returns the facts by which a rank's ops are chosen; `kv_dtype`, `rows8`: see `OpSpec`."""
        local = self.local(ranks)
        return OpSpec(
            heads=local.heads,
            kv_heads=local.kv_heads,
            head_dim=self.head_dim,
            dtype=dtype,
            norm_eps=self.norm_eps,
            qk_norm=self.qk_norm,
            sliding_window=any(self.windows),
            kv_dtype=kv_dtype,
            coded=frozenset(kind.value for kind in scheme.kinds),
            rows8=rows8,
        )

    def attention(self, layer: int) -> AttentionSpec:
        """Returns the facts of one layer's attention."""
        return AttentionSpec(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            qk_norm_eps=self.norm_eps if self.qk_norm else None,
            window=self.windows[layer],
        )


@dataclass(frozen=True)
class Differences:
    """Where the facts of an architecture are not Llama's plain ones."""

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int = 0  # of the layers that slide


def dense_spec(hf: HfConfig, differences: Differences) -> ModelSpec:
    """Reads what all dense decoders state alike."""
    hf.expect("hidden_act", "silu")
    width, heads, layers = (
        hf.integer("hidden_size"),
        hf.integer("num_attention_heads"),
        hf.integer("num_hidden_layers"),
    )
    kv_heads = hf.integer("num_key_value_heads", heads)
    if heads % kv_heads != 0:
        raise hf.refuse("num_key_value_heads", kv_heads, f"{heads} heads do not divide by it")
    if "head_dim" not in hf.values and width % heads != 0:
        raise hf.refuse("hidden_size", width, f"{heads} heads do not divide it; give head_dim")
    head_dim = hf.integer("head_dim", width // heads)
    if head_dim % 2 != 0:
        raise hf.refuse("head_dim", head_dim, "expected an even number")
    rope = hf.rope(head_dim)
    return ModelSpec(
        architecture=hf.architecture(),
        layers=layers,
        width=width,
        mlp_width=hf.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=hf.integer("vocab_size"),
        context_tokens_max=_context(hf.integer("max_position_embeddings"), rope),
        norm_eps=hf.number("rms_norm_eps", 1e-6),
        rope=rope,
        windows=hf.windows(layers, differences.window) if differences.window else (0,) * layers,
        tied=hf.flag("tie_word_embeddings"),
        qkv_bias=differences.qkv_bias,
        out_bias=differences.out_bias,
        mlp_bias=differences.mlp_bias,
        qk_norm=differences.qk_norm,
        checkpoint_dtype=hf.dtype(),
    )


def _context(positions: int, rope: RopeSpec) -> int:
    """Returns the longest sequence: checkpoints state it before these two scalings stretch it."""
    match rope.scaling:
        case LinearScaling(factor=factor):
            return int(positions * factor)
        case YarnScaling(factor=factor, original_tokens=original):
            return max(positions, int(original * factor))
        case _:
            return positions

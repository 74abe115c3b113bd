"""The one transformer. What makes an architecture is its spec, its recipe and its names."""

# T tokens · S sampled tokens · D width · E head dim · C this rank's share of the vocabulary

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from headrace.layers.attention import Attention
from headrace.layers.build import Build
from headrace.layers.embedding import VocabEmbedding, VocabHead
from headrace.layers.mlp import GatedMlp
from headrace.layers.norm import RmsNorm
from headrace.layers.rotary import Rotary
from headrace.layers.step import StepContext
from headrace.models.spec import ModelSpec


class Block(nn.Module):
    """Pre-norm attention and MLP around a residual stream."""

    def __init__(self, build: Build, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        attention = Attention(build, spec.attention(layer), layer)
        mlp = GatedMlp(build, spec.width, spec.mlp_width, spec.mlp_bias)
        self.attention_norm = RmsNorm(build, spec.width, spec.norm_eps, feeds=attention.qkv)
        self.attention = attention
        self.mlp_norm = RmsNorm(build, spec.width, spec.norm_eps, feeds=mlp.gate_up)
        self.mlp = mlp

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, cos_sin_TE: Tensor, step: StepContext
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x_TD: what the layer before adds to the residual stream, on this rank.
            residual_TD: the stream; None in the first layer, where `x_TD` begins it.

        Returns: what this layer adds to the residual stream, and the stream until then.
        """
        normed_TD, stream_TD = self.attention_norm(x_TD, residual_TD)
        x_TD = self.attention(normed_TD, cos_sin_TE, step)
        normed_TD, stream_TD = self.mlp_norm(x_TD, stream_TD)
        return self.mlp(normed_TD), stream_TD


@dataclass(frozen=True)
class Recipe:
    """How an architecture's data flow differs from Llama's, beyond the facts of its spec."""

    block: type[Block] = field(default=Block)


class WholeStep(Protocol):
    """Computes what `Decoder.compose` does, in one call (`models/fused.py`)."""

    def __call__(self, tokens_T: Tensor, step: StepContext) -> Tensor: ...


class Decoder(nn.Module):
    """Embeds a step's tokens, runs the blocks, and returns logits where they are wanted."""

    def __init__(self, build: Build, spec: ModelSpec, recipe: Recipe) -> None:
        super().__init__()
        self.spec = spec
        self.embed = VocabEmbedding(build, spec.vocab_size, spec.width)
        self.rotary = Rotary(spec.rope)
        self.blocks = nn.ModuleList(recipe.block(build, spec, i) for i in range(spec.layers))
        self.head = VocabHead(build, spec.vocab_size, spec.width)
        self.norm = RmsNorm(build, spec.width, spec.norm_eps, feeds=self.head)
        # Of parameters, before packing takes weights out of them.
        self.weight_bytes = 0
        self.scaled_caches = 0  # layers whose checkpoint has scales of their cache
        self.whole_step: WholeStep | None = None
        # One line of the startup log: how a step runs, and why so.
        self.step_choice = "by operation"

    @torch.inference_mode()
    def forward(self, tokens_T: Tensor, step: StepContext) -> Tensor:
        """
        Args:
            tokens_T: int64.

        Returns: logits_SC of the tokens `step.sampled_S` over this rank's share of the vocabulary;
        float32 or, on devices that sample from it, the model's dtype.
        """
        if self.whole_step is not None:
            return self.whole_step(tokens_T, step)
        return self.compose(tokens_T, step)

    def compose(self, tokens_T: Tensor, step: StepContext) -> Tensor:
        """The step, operation by operation."""
        x_TD, residual_TD = self.hidden(tokens_T, step)
        return self.logits(x_TD, residual_TD, step.sampled_S)

    def hidden(self, tokens_T: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """Returns what the last block adds to the residual stream, and the stream until then."""
        cos_sin_TE = step.cos_sin_TE
        if cos_sin_TE is None:
            cos_sin_TE = self.rotary(step.positions_T)
        x_TD, residual_TD = self.embed(tokens_T), None
        for block in self.blocks:
            x_TD, residual_TD = block(x_TD, residual_TD, cos_sin_TE, step)
        assert residual_TD is not None, "a decoder has blocks"
        return x_TD, residual_TD

    def logits(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        sampled_S: Tensor | None,
        out_SC: Tensor | None = None,
    ) -> Tensor:
        """Returns logits_SC of the tokens `sampled_S`, or of all; in `out_SC`, if given.

        Args:
            x_TD, residual_TD: what `hidden` returned; not overwritten where tokens are chosen.
        """
        if sampled_S is not None:
            x_TD = x_TD.index_select(0, sampled_S)
            residual_TD = residual_TD.index_select(0, sampled_S)
        normed_SD, _ = self.norm(x_TD, residual_TD)
        return self.head(normed_SD, out_SC)

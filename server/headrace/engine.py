"""What plans are executed with, and what a `Prepare` asks for: values, and nothing that runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.comm import Comm
from headrace.device import Device
from headrace.errors import PlanError
from headrace.kv import KvLayout
from headrace.layers.step import StepContext
from headrace.ops.decode_inputs import GatherDecodeInputs
from headrace.ops.paged_attention import AttentionBackend
from headrace.ops.sampling import SamplingBackend, SharedSampling, Watermark
from headrace.startup import Phases


class Model(Protocol):
    """The model, as the executor sees it."""

    def __call__(self, tokens_T: Tensor, step: StepContext) -> Tensor:
        """Returns logits_LC of the tokens `step.sampled_S`, C being this rank's columns."""
        ...


class PartedModel(Protocol):
    """A model whose blocks and head are called apart."""

    def hidden(self, tokens_T: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """Returns what the last block adds to the residual stream, and the stream until then."""
        ...

    def logits(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        sampled_S: Tensor | None,
        out_SC: Tensor | None = None,
    ) -> Tensor:
        """Returns the logits of the tokens `sampled_S`, given what `hidden` returned."""
        ...


@dataclass(frozen=True)
class GraphInputs:
    """What graphs are made of: how they find a decode step's inputs, and the model's parts.

    Attributes:
        gather: from slots and positions to everything else.
        cos_sin_LE: the angles of all positions.
    """

    gather: GatherDecodeInputs
    cos_sin_LE: Tensor
    model: PartedModel


@dataclass(frozen=True)
class Engine:
    """Everything a plan is executed with, loaded."""

    device: Device
    comm: Comm
    model: Model
    attention: AttentionBackend
    sampling: SamplingBackend
    architecture: str
    vocab_size: int
    context_tokens_max: int
    layers: int
    kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype
    weight_bytes: int
    kv_bytes_max: int  # 0: the device's default
    kv_dtype: torch.dtype | None = None  # of the KV cache, where that is not `dtype`
    logits_dtype: torch.dtype = torch.float32  # what the model returns
    graph_inputs: GraphInputs | None = None  # what the device's graphs need, where it has any
    width: int = 0  # of the residual stream, which ranks sum
    vocab_columns: int = 0  # what this rank has of the vocabulary, padding included; 0: all
    logits_stride: int = 0  # numbers from one row of logits to the next; 0: as many as tokens
    shared_sampling: SharedSampling | None = None  # None: logits are gathered first
    watermark: Watermark = field(default_factory=Watermark)  # of rows that ask for one
    phases: Phases = field(default_factory=Phases)  # where the seconds of the start go


@dataclass(frozen=True)
class Preparation:
    """What `Prepare` asks for; as in `PrepareRequest`."""

    first_step: int
    block_tokens: int
    slots_max: int
    state_slots_max: int
    step_tokens_max: int
    step_rows_max: int
    prompt_logprob_tokens_max: int = 0
    kv_dtype: str = ""
    memory_fraction: float = 0.0
    blocks_max: int = 0

    @staticmethod
    def of(request: Any) -> Preparation:
        """Reads a `PrepareRequest`."""
        return Preparation(
            first_step=request.first_step,
            block_tokens=request.block_tokens,
            slots_max=request.slots_max,
            state_slots_max=request.state_slots_max,
            step_tokens_max=request.step_tokens_max,
            step_rows_max=request.step_rows_max or request.slots_max,
            prompt_logprob_tokens_max=request.prompt_logprob_tokens_max,
            kv_dtype=request.kv_dtype,
            memory_fraction=request.memory_fraction,
            blocks_max=request.blocks_max,
        )


@dataclass(frozen=True)
class Prepared:
    """What `Prepare` answers."""

    blocks: int
    memory: tuple[tuple[str, int], ...]


def kv_layout(engine: Engine, wanted: Preparation) -> KvLayout:
    """The layout of the pool that a preparation asks for."""
    loaded = engine.kv_dtype or engine.dtype
    dtype = getattr(torch, wanted.kv_dtype) if wanted.kv_dtype else loaded
    if dtype != loaded:
        raise PlanError(f"the model was loaded for a KV pool of {loaded}, not {dtype}")
    return KvLayout(engine.layers, engine.kv_heads, engine.head_dim, wanted.block_tokens, dtype)

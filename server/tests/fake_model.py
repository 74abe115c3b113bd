"""A model made of hashes: its logits depend on exactly the tokens that its cells hold."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from headrace.comm import Comm, SingleComm
from headrace.device.cpu import CpuDevice
from headrace.engine import Engine, Preparation
from headrace.layers.step import StepContext
from headrace.ops import sampling
from headrace.ops.paged_attention import StepShape

VOCAB = 97
CONTEXT = 256


class FakeAttention:
    """Keeps the step's shape for the model to look at."""

    def plan(self, shape: StepShape) -> StepShape:
        return shape

    def attend(
        self, q_THE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, plan: StepShape
    ) -> Tensor:
        raise AssertionError("the fake model attends to nothing")


class FakeModel:
    """Writes each token into its cell, then reads every row's prefix back through its table."""

    def __init__(self) -> None:
        self.poison: set[int] = set()  # prefixes that end in these tokens give NaN
        self.shapes: list[StepShape] = []

    def __call__(self, tokens_T: Tensor, step: StepContext) -> Tensor:
        shape: StepShape = step.attention
        self.shapes.append(shape)
        cells = step.kv.layer(0)[0].flatten()
        cells[step.cells_T] = tokens_T.float()
        wanted = set(step.sampled_S.tolist())
        logits: list[Tensor] = []
        at = 0
        for row, (start, length) in enumerate(zip(shape.row_start_S, shape.row_len_S, strict=True)):
            for position in range(int(start), int(start + length)):
                assert int(step.positions_T[at]) == position
                if at in wanted:
                    logits.append(self._logits(self._prefix(cells, shape, row, position)))
                at += 1
        return torch.stack(logits) if logits else torch.zeros(0, VOCAB)

    def _prefix(self, cells: Tensor, shape: StepShape, row: int, position: int) -> list[int]:
        blocks = shape.table_SB[row].tolist()
        size = shape.block_tokens
        return [int(cells[blocks[p // size] * size + p % size]) for p in range(position + 1)]

    def _logits(self, prefix: list[int]) -> Tensor:
        if prefix[-1] in self.poison:
            return torch.full((VOCAB,), torch.nan)
        return torch.from_numpy(logits_after(prefix))


def logits_after(prefix: list[int]) -> np.ndarray:
    """What the fake model thinks comes next."""
    digest = hashlib.blake2b(np.array(prefix, np.int32).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest)).normal(0, 3, VOCAB).astype(np.float32)


def fake_engine(model: FakeModel | None = None, comm: Comm | None = None) -> Engine:
    """An engine around the fake model, with the real sampler."""
    device = CpuDevice(threads=1)
    return Engine(
        device=device,
        comm=comm or SingleComm(),
        model=model or FakeModel(),
        attention=FakeAttention(),
        sampling=sampling.select(device),
        architecture="Fake",
        vocab_size=VOCAB,
        context_tokens_max=CONTEXT,
        layers=1,
        kv_heads=1,
        head_dim=1,
        dtype=torch.float32,
        weight_bytes=0,
        kv_bytes_max=1 << 20,
    )


def preparation(**changes: int) -> Preparation:
    """What the tests prepare, unless they say otherwise."""
    wanted = {
        "first_step": 0,
        "block_tokens": 4,
        "slots_max": 8,
        "state_slots_max": 8,
        "step_tokens_max": 64,
        "step_rows_max": 8,
    }
    return Preparation(**(wanted | changes))

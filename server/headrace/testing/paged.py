"""Running a decoder over a paged cache without a router: what tests and measurements step with."""

# T tokens · S rows · V vocabulary

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from headrace.comm import Comm, SingleComm
from headrace.kv import KvLayout, KvPool
from headrace.layers.embedding import whole_vocabulary
from headrace.layers.step import StepContext
from headrace.models import Decoder
from headrace.ops import OpTable
from headrace.ops.paged_attention import StepShape


@dataclass
class PagedSequence:
    """The blocks of a sequence, and how many of its tokens they hold."""

    blocks: list[int] = field(default_factory=list[int])
    length: int = 0


class PagedRunner:
    """A pool, and steps of rows over it. Blocks are handed out in a shuffled order."""

    def __init__(
        self,
        model: Decoder,
        ops: OpTable,
        *,
        dtype: torch.dtype,
        comm: Comm | None = None,
        blocks: int = 256,
        block_tokens: int = 16,
        fill: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        spec = model.spec
        self._comm = comm or SingleComm()
        kv_heads = spec.local(self._comm.size).kv_heads
        layout = KvLayout(spec.layers, kv_heads, spec.head_dim, block_tokens, dtype)
        self._device = device or torch.device("cpu")
        self.kv = KvPool(layout, blocks, self._device)
        if fill != 0.0:
            for layer in range(spec.layers):
                for cache in self.kv.layer(layer):
                    cache.fill_(fill)
        self._model = model
        self._ops = ops
        self._block_tokens = block_tokens
        shuffled = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(0)) + 1
        self._free: list[int] = shuffled.tolist()

    def step(self, rows: list[tuple[PagedSequence, list[int]]], every: bool = False) -> Tensor:
        """Runs one step: each row appends its tokens to its sequence.

        Returns: logits_SV of each row's last token, or of every token.
        """
        start = np.array([sequence.length for sequence, _ in rows], dtype=np.int32)
        length = np.array([len(tokens) for _, tokens in rows], dtype=np.int32)
        for sequence, tokens in rows:
            sequence.length += len(tokens)
            while len(sequence.blocks) * self._block_tokens < sequence.length:
                sequence.blocks.append(self._free.pop())
        widest = max(len(sequence.blocks) for sequence, _ in rows)
        table_SB = torch.zeros((len(rows), widest), dtype=torch.int32)
        for row, (sequence, _) in enumerate(rows):
            table_SB[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        row_T = np.repeat(np.arange(len(rows)), length)
        ends = np.cumsum(length)
        position_T = np.arange(ends[-1]) - np.repeat(ends - length, length) + start[row_T]
        block_T = table_SB.numpy()[row_T, position_T // self._block_tokens].astype(np.int64)
        cells_T = block_T * self._block_tokens + position_T % self._block_tokens
        shape = StepShape(
            start,
            length,
            table_SB.to(self._device),
            self._block_tokens,
            kv_len_S=self._put(start + length),
            first_S1=self._put(np.concatenate(([0], ends)).astype(np.int32)),
            decode_rows=next((row for row, n in enumerate(length) if n != 1), len(rows)),
        )
        step = StepContext(
            positions_T=self._put(position_T.astype(np.int64)),
            cells_T=self._put(cells_T),
            sampled_S=self._put(np.arange(ends[-1]) if every else ends - 1),
            attention=self._ops.paged_attention.plan(shape),
            kv=self.kv,
        )
        ids = [token for _, tokens in rows for token in tokens]
        logits_SC = self._model(torch.tensor(ids, device=self._device), step)
        return whole_vocabulary(logits_SC, self._comm, self._model.spec.vocab_size).float()

    def _put(self, column: np.ndarray) -> Tensor:
        return torch.from_numpy(column).to(self._device)

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        """Returns the next `tokens` most likely tokens of each prompt, all run as one batch."""
        sequences = [PagedSequence() for _ in prompts]
        fed = prompts
        output: list[list[int]] = [[] for _ in prompts]
        for _ in range(tokens):
            logits_SV = self.step(list(zip(sequences, fed, strict=True)))
            fed = [[int(token)] for token in logits_SV.argmax(-1)]
            for row, token in zip(output, fed, strict=True):
                row.extend(token)
        for sequence in sequences:
            self._free += sequence.blocks
        return output

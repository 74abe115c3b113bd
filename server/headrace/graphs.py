"""Decode steps as recorded launches: a forward and a greedy sampler for each size of batch.

A recorded launch reads and writes the memory it was recorded with. So a graph's inputs are the
staged columns at the front of the inbox (slot and position of each row) and what the slots keep on
the device; everything else about a step is computed from them by the graph itself.

The composed model, called with the same inputs, is the slow twin.
"""

# M rows of a graph · V vocabulary · P positions · E head dim

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.batch import Column, Step
from headrace.device import Download, Graph
from headrace.kv import KvPool
from headrace.layers.step import StepContext
from headrace.ops.paged_attention import DecodeShape
from headrace.ops.sampling import SampleRows
from headrace.sampler import Outputs
from headrace.slots import SlotRows

if TYPE_CHECKING:
    from headrace.executor import Engine

# The largest batch that graphs compute.
ROWS_MAX = 512

# Sizes from one power of two to the next: padding is at most a fifth of a large batch.
SIZES_AN_OCTAVE = 4

# A row's result: token (int64), log-probability (float32), whether its logits were bad (bool).
TOKEN_BYTES, LOGPROB_BYTES, BAD_BYTES = 8, 4, 1


def buckets(rows_max: int) -> tuple[int, ...]:
    """Sizes of batches that graphs are recorded for: every one up to 8, four an octave beyond."""
    largest = min(rows_max, ROWS_MAX)
    sizes = set(range(1, min(8, largest) + 1)) | {largest}
    octave = 8
    while octave < largest:
        step = octave // SIZES_AN_OCTAVE
        sizes |= {s for s in range(octave + step, 2 * octave + 1, step) if s <= largest}
        octave *= 2
    return tuple(sorted(sizes))


@dataclass(frozen=True)
class _Bucket:
    """The graphs of one size."""

    forward: Graph
    greedy: Graph | None


class DecodeGraphs:
    """The graphs of one pool and its slots."""

    def __init__(
        self,
        engine: Engine,
        slots: SlotRows,
        pool: KvPool,
        inbox: Tensor,
        sizes: tuple[int, ...],
    ) -> None:
        """
        Args:
            inbox: where staged columns arrive; a graph of M rows reads M slots, then M positions.
        """
        self._engine = engine
        self._slots = slots
        self._pool = pool
        self._inbox = inbox
        self._sizes = sizes
        self._graphs: dict[int, _Bucket] = {}
        where = engine.device.torch_device
        largest = sizes[-1]
        self._logits_MV = torch.zeros(
            (largest, engine.vocab_size), dtype=engine.logits_dtype, device=where
        )
        size = (TOKEN_BYTES + LOGPROB_BYTES + BAD_BYTES) * largest
        self._result = torch.zeros(size, dtype=torch.uint8, device=where)
        # Ranks that are told what rank 0 drew sample by operation.
        self.samples = engine.comm.size == 1

    def capture(self) -> None:
        """Records all sizes, the largest first: smaller ones fit into its memory."""
        for rows in reversed(self._sizes):
            # What libraries load and plan at a first call, they do now.
            self._forward(rows)
            forward = self._engine.device.capture(lambda rows=rows: self._forward(rows))
            greedy = None
            if self.samples:
                self._greedy(rows)
                greedy = self._engine.device.capture(lambda rows=rows: self._greedy(rows))
            self._graphs[rows] = _Bucket(forward, greedy)

    def forward(self, step: Step) -> Tensor:
        """Launches the forward of a step that has a bucket.

        Returns: logits_RV of the step's rows; the next forward overwrites them.
        """
        self._graphs[step.bucket].forward.replay()
        return self._logits_MV[: step.row_R.size]

    def greedy(self, step: Step) -> Outputs:
        """Launches the sampler of a step whose rows all take their best token."""
        graph = self._graphs[step.bucket].greedy
        assert graph is not None, "ranks of a group sample by operation"
        graph.replay()
        size = (TOKEN_BYTES + LOGPROB_BYTES + BAD_BYTES) * step.bucket
        # A copy, because the next step's sampler may overwrite the result before it is read.
        download = self._engine.device.download([self._result[:size].clone()])
        return Outputs(
            row_R=step.row_R,
            download=_Packed(download, step.bucket, step.row_R.size),
            alternative_rows=[],
            prompt_rows=(),
        )

    def _forward(self, rows: int) -> None:
        slot_M, start_M = self._columns(rows)
        slots, engine = self._slots, self._engine
        block_tokens = self._pool.layout.block_tokens
        inputs = engine.graph_inputs
        assert inputs is not None, "graphs without an op that makes their inputs"
        made = inputs.gather(
            slot_M, start_M, slots.last_token_Z, slots.table, inputs.cos_sin_LE, block_tokens
        )
        shape = DecodeShape(rows, slot_M, made.kv_len_S, slots.table, block_tokens)
        context = StepContext(
            positions_T=made.positions_S,
            cells_T=made.cells_S,
            sampled_S=None,
            attention=engine.attention.plan_decode(shape),
            kv=self._pool,
            cos_sin_TE=made.cos_sin_SE,
        )
        self._logits_MV[:rows].copy_(engine.model(made.tokens_S, context))

    def _greedy(self, rows: int) -> None:
        slot_M, _ = self._columns(rows)
        no_features = np.zeros(rows, np.int64)
        logits_MV, sampling = self._logits_MV[:rows], self._engine.sampling
        if not sampling.takes_half:
            logits_MV = logits_MV.float()
        samples = sampling.sample(logits_MV, SampleRows(no_features))
        self._slots.accept(slot_M, samples.token_S)
        token, logprob, bad = _columns(rows)
        token.of(self._result).copy_(samples.token_S)
        logprob.of(self._result).copy_(samples.logprob_S)
        bad.of(self._result).copy_(samples.bad_S)

    def _columns(self, rows: int) -> tuple[Tensor, Tensor]:
        """Slot and position of each row, as the batcher staged them."""
        slots, starts = Column(0, rows, np.int64), Column(8 * rows, rows, np.int64)
        return slots.of(self._inbox), starts.of(self._inbox)


class _Packed(Download):
    """A graph's result, taken apart on the host."""

    def __init__(self, download: Download, bucket: int, rows: int) -> None:
        self._download = download
        self._bucket = bucket
        self._rows = rows

    def done(self) -> bool:
        return self._download.done()

    def wait(self) -> list[np.ndarray]:
        (packed,) = self._download.wait()
        return [column.of_host(packed)[: self._rows] for column in _columns(self._bucket)]


def _columns(rows: int) -> tuple[Column, Column, Column]:
    """Token, log-probability and badness of a result of so many rows."""
    logprob = TOKEN_BYTES * rows
    bad = logprob + LOGPROB_BYTES * rows
    return (
        Column(0, rows, np.int64),
        Column(logprob, rows, np.float32),
        Column(bad, rows, np.bool_),
    )

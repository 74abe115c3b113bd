"""Steps as recorded launches: decode steps whole, other steps in pieces between attentions.

A decode step is two graphs for each size of batch, a forward and a greedy sampler. A step with
prompts is a graph for each stretch between two layers' attentions, for each number of tokens: what
lies between knows nothing of rows, while attention is launched for the rows there are.

A recorded launch reads and writes the memory it was recorded with. So a graph's inputs are the
staged columns at the front of the inbox (slot and position of each row) and what the slots keep on
the device; everything else about a step is computed from them by the graph itself.

The composed model, called with the same inputs, is the slow twin.
"""

# T tokens, padded · D width · M rows of a graph · C this rank's columns of the vocabulary
# P positions · E head dim

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headrace.batch import Column, Step
from headrace.device import Download, Graph
from headrace.kv import KvPool
from headrace.layers.step import StepContext
from headrace.ops.kv_write import UNIT, KvScales
from headrace.ops.paged_attention import DecodeShape
from headrace.ops.sampling import Samples
from headrace.sampler import Outputs
from headrace.slots import SlotRows

if TYPE_CHECKING:
    from headrace.engine import Engine

# The largest batch that graphs compute.
ROWS_MAX = 512

# Sizes from one power of two to the next: padding is at most a fifth of a large batch.
SIZES_AN_OCTAVE = 4

# A row's result: token (int64), log-probability (float32), whether its logits were bad (bool).
TOKEN_BYTES, LOGPROB_BYTES, BAD_BYTES = 8, 4, 1


# The smallest and the largest step that is computed in pieces, and how many sizes an octave has.
# Larger steps keep the device busy while their operations are launched one by one.
PIECE_TOKENS_MIN = 16
PIECE_TOKENS_MAX = 2048
PIECE_SIZES_AN_OCTAVE = 8


def token_buckets(tokens_max: int) -> tuple[int, ...]:
    """Sizes of steps that are computed in pieces: padding is at most an eighth."""
    sizes = {PIECE_TOKENS_MIN}
    octave = PIECE_TOKENS_MIN
    while octave < PIECE_TOKENS_MAX:
        step = octave // PIECE_SIZES_AN_OCTAVE
        sizes |= set(range(octave + step, 2 * octave + 1, step))
        octave *= 2
    return tuple(sorted(size for size in sizes if size <= tokens_max))


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
    greedy: Graph


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
        columns = engine.vocab_columns or engine.vocab_size
        self._logits_MC = torch.zeros((largest, columns), dtype=engine.logits_dtype, device=where)
        size = (TOKEN_BYTES + LOGPROB_BYTES + BAD_BYTES) * largest
        self._result = torch.zeros(size, dtype=torch.uint8, device=where)

    def capture(self) -> None:
        """Records all sizes, the largest first: smaller ones fit into its memory."""
        for rows in reversed(self._sizes):
            # What libraries load and plan at a first call, they do now.
            self._forward(rows)
            forward = self._engine.device.capture(lambda rows=rows: self._forward(rows))
            self._greedy(rows)
            greedy = self._engine.device.capture(lambda rows=rows: self._greedy(rows))
            self._graphs[rows] = _Bucket(forward, greedy)

    def forward(self, step: Step) -> Tensor:
        """Launches the forward of a step that has a bucket.

        Returns: logits_RC of the step's rows; the next forward overwrites them.
        """
        self._graphs[step.bucket].forward.replay()
        return self._logits_MC[: step.row_R.size]

    def greedy(self, step: Step) -> Outputs:
        """Launches the sampler of a step whose rows all take their best token."""
        self._graphs[step.bucket].greedy.replay()
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
        x_MD, residual_MD = inputs.model.hidden(made.tokens_S, context)
        inputs.model.logits(x_MD, residual_MD, None, self._logits_MC[:rows])

    def _greedy(self, rows: int) -> None:
        slot_M, _ = self._columns(rows)
        token_S, logprob_S, bad_S = (column.of(self._result) for column in _result_columns(rows))
        shared = self._engine.shared_sampling
        accept = self._engine.sampling.greedy_accept if shared is None else shared.accept
        accept(
            self._logits_MC[:rows],
            slot_M,
            self._slots.last_token_Z,
            Samples(token_S, logprob_S, bad_S),
        )

    def _columns(self, rows: int) -> tuple[Tensor, Tensor]:
        """Slot and position of each row, as the batcher staged them."""
        slots, starts = Column(0, rows, np.int64), Column(8 * rows, rows, np.int64)
        return slots.of(self._inbox), starts.of(self._inbox)


@dataclass(frozen=True)
class _Piece:
    """A graph, and the attention behind it: what it was called with, in memory that is reused."""

    graph: Graph
    q_THE: Tensor
    caches: tuple[Tensor, Tensor]
    window: int
    fresh: tuple[Tensor, Tensor] | None
    scales: KvScales


@dataclass(frozen=True)
class _Pieces:
    """A step of one size."""

    pieces: tuple[_Piece, ...]
    last: Graph
    x_TD: Tensor
    residual_TD: Tensor


class PieceGraphs:
    """Steps of up to so many tokens, in pieces; of one pool."""

    def __init__(self, engine: Engine, pool: KvPool, inbox: Tensor, sizes: tuple[int, ...]) -> None:
        """
        Args:
            inbox: where staged columns arrive: the tokens of a step of one of the sizes, then
                their positions, then their cells.
        """
        assert engine.graph_inputs is not None, "graphs of a model that has no parts"
        self._engine = engine
        self._model = engine.graph_inputs.model
        self._pool = pool
        self._inbox = inbox
        self._sizes = sizes
        self._steps: dict[int, _Pieces] = {}
        self._o_THE: Tensor | None = None

    def capture(self) -> None:
        """Records all sizes, the largest first: smaller ones fit into its memory."""
        for tokens in reversed(self._sizes):
            # What libraries load and plan at a first call, they do now.
            self._hidden(tokens, lambda q_THE, *_: self._output(q_THE))
            self._steps[tokens] = self._record(tokens)

    def forward(self, step: Step) -> Tensor:
        """Launches the forward of a step that is padded to one of the sizes.

        Returns: logits_LC of the tokens that are wanted.
        """
        assert step.inputs is not None and self._o_THE is not None
        context, recorded = step.inputs.context, self._steps[step.padded]
        attend: Callable[..., Tensor] = self._engine.attention.attend
        plan, o_THE = context.attention, self._o_THE[: step.padded]
        for piece in recorded.pieces:
            piece.graph.replay()
            attend(
                *(piece.q_THE, *piece.caches, plan),
                *(piece.window, piece.fresh, piece.scales),
                out=o_THE,
            )
        recorded.last.replay()
        return self._model.logits(recorded.x_TD, recorded.residual_TD, context.sampled_S)

    def _record(self, tokens: int) -> _Pieces:
        device = self._engine.device
        recorder = device.recorder()
        pieces: list[_Piece] = []

        def attend(
            q_THE: Tensor,
            k_cache_NPKE: Tensor,
            v_cache_NPKE: Tensor,
            plan: None,
            window: int = 0,
            fresh: tuple[Tensor, Tensor] | None = None,
            scales: KvScales = UNIT,
        ) -> Tensor:
            del plan
            graph = recorder.end()
            if fresh is not None:
                fresh = device.alias(fresh[0]), device.alias(fresh[1])
            caches = k_cache_NPKE, v_cache_NPKE
            pieces.append(_Piece(graph, device.alias(q_THE), caches, window, fresh, scales))
            o_THE = self._output(q_THE)
            recorder.begin()
            return o_THE

        recorder.begin()
        x_TD, residual_TD = self._hidden(tokens, attend)
        return _Pieces(tuple(pieces), recorder.end(), x_TD, residual_TD)

    def _hidden(self, tokens: int, attend: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        columns = (Column(8 * tokens * i, tokens, np.int64).of(self._inbox) for i in range(3))
        tokens_T, positions_T, cells_T = columns
        context = StepContext(
            positions_T=positions_T,
            cells_T=cells_T,
            sampled_S=None,
            attention=None,
            kv=self._pool,
            attend=attend,
        )
        return self._model.hidden(tokens_T, context)

    def _output(self, q_THE: Tensor) -> Tensor:
        """Where attention leaves its output, of every layer and size; zeros at first."""
        if self._o_THE is None:
            shape = (self._sizes[-1], *q_THE.shape[1:])
            self._o_THE = torch.zeros(shape, dtype=q_THE.dtype, device=q_THE.device)
        return self._o_THE[: q_THE.shape[0]]


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
        return [column.of_host(packed)[: self._rows] for column in _result_columns(self._bucket)]


def _result_columns(rows: int) -> tuple[Column, Column, Column]:
    """Token, log-probability and badness of a result of so many rows."""
    logprob = TOKEN_BYTES * rows
    bad = logprob + LOGPROB_BYTES * rows
    return (
        Column(0, rows, np.int64),
        Column(logprob, rows, np.float32),
        Column(bad, rows, np.bool_),
    )

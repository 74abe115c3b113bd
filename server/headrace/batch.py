"""From a plan to what the model is called with: staged on the host, copied once, then shaped."""

# S rows of the plan · T query tokens · R sampled rows · P tokens per block · W table entries

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.device import Device
from headrace.errors import PlanError
from headrace.kv import KvPool
from headrace.layers.step import StepContext
from headrace.ops.paged_attention import AttentionBackend, StepShape
from headrace.slots import SlotRows
from headrace.wire import Plan, RowFlag

# Staging buffers: one for each step that may be on its way to the device, and one to write.
STAGES = 4

# Staged bytes: token, position, cell and logits index a token; slot, slot of the sampled rows,
# which logits are drawn from, row and first token of rows that go on from their slot, length and
# first token a row; and two numbers for each block that is appended to a table.
TOKEN_BYTES = 4 * 8
ROW_BYTES = 5 * 8 + 2 * 4
BLOCK_BYTES = 2 * 8
# What the alignment of the columns may add.
SLACK_BYTES = 16 * 8


@dataclass(frozen=True)
class PromptRow:
    """A row that wants the log-probabilities of its own tokens."""

    slot: int
    start: int
    first: int  # index of its first token, in T
    length: int
    logits: int  # index of its first token's logits, among the step's logits
    ends: bool  # the prompt ends here: a token is drawn


@dataclass(frozen=True)
class Inputs:
    """What the model is called with."""

    tokens_T: Tensor
    context: StepContext


@dataclass(frozen=True)
class Step:
    """A plan, ready to be launched."""

    plan: Plan
    inputs: Inputs | None  # None: the graph of the bucket makes them from what was staged
    bucket: int  # rows of the graph that computes the step; 0: none does
    padded: int  # tokens of the graphs that compute the step but for its attention; 0: none do
    row_R: np.ndarray  # int64: the sampled rows of the plan
    masked_R: np.ndarray  # bool: what waits for a mask (R7)
    slot_R: np.ndarray  # int64, host
    device_slot_R: Tensor
    position_R: np.ndarray  # int64: where the drawn tokens will be
    logits_R: Tensor | None  # which logits are drawn from; None: all of them
    prompts: tuple[PromptRow, ...]
    length_S: np.ndarray  # int64: the slots' lengths after the step


@dataclass(frozen=True)
class GraphSizes:
    """What graphs exist, ascending."""

    rows: tuple[int, ...] = ()  # of decode steps
    tokens: tuple[int, ...] = ()  # of other steps, whose attention no graph computes

    def __bool__(self) -> bool:
        return bool(self.rows or self.tokens)


NO_GRAPHS = GraphSizes()


class Batcher:
    """Makes steps from plans. Owns the staging buffers."""

    def __init__(
        self,
        device: Device,
        slots: SlotRows,
        pool: KvPool,
        attention: AttentionBackend,
        *,
        step_tokens_max: int,
        step_rows_max: int,
        vocab_size: int,
        sizes: GraphSizes = NO_GRAPHS,
    ) -> None:
        self._device = device
        self._slots = slots
        self._pool = pool
        self._attention = attention
        self._tokens_max = step_tokens_max
        self._rows_max = step_rows_max
        self._vocab_size = vocab_size
        self._block_tokens = pool.layout.block_tokens
        self._sizes = sizes
        # A step writes to every block it appends, but for the one that its last token may need.
        blocks_max = step_tokens_max // self._block_tokens + 2 * step_rows_max
        size = TOKEN_BYTES * step_tokens_max + ROW_BYTES * step_rows_max + BLOCK_BYTES * blocks_max
        size += max([0, *(2 * 8 * rows for rows in sizes.rows), *(24 * t for t in sizes.tokens)])
        self.staging = device.staging(size + SLACK_BYTES, STAGES)

    def build(self, plan: Plan) -> Step:
        """Applies a plan to the slots and stages it; raises `PlanError` at a contradiction."""
        self._slots.apply(plan)
        if plan.zero_block.size:
            self._zero(plan)
        slot_S = plan.row_slot_S.astype(np.int64)
        length_S = plan.row_len_S.astype(np.int64)
        start_S = self._starts(plan, slot_S)
        end_S = start_S + length_S
        self._check(plan, slot_S, length_S, end_S)
        self._slots.length_Z[slot_S] = end_S
        stage = _Stage(self.staging.host(plan.step))
        bucket = self._bucket(plan)
        if bucket:
            return self._decode(plan, stage, bucket, slot_S, start_S)
        return self._general(plan, stage, slot_S, start_S, length_S)

    def _bucket(self, plan: Plan) -> int:
        """Rows of the graph that computes a plan; 0 if none does."""
        rows, flags = plan.row_slot_S.size, plan.row_flags_S
        if not rows:
            return 0
        wanted = RowFlag.FROM_SLOT | RowFlag.SAMPLE
        other = RowFlag.PROMPT_LOGPROBS  # Masks are the sampler's.
        if (plan.row_len_S != 1).any() or ((flags & (wanted | other)) != wanted).any():
            return 0
        return _at_least(self._sizes.rows, rows)

    def _decode(
        self, plan: Plan, stage: _Stage, bucket: int, slot_S: np.ndarray, start_S: np.ndarray
    ) -> Step:
        """A step of rows of one token each, which a graph computes from slots and positions."""
        rows = slot_S.size
        if plan.token_id.size:
            raise PlanError(f"step {plan.step} brings {plan.token_id.size} tokens for 0")
        # Padding rows belong to the last slot, whose table is nothing but scrap.
        padded_S = stage.take(bucket)
        padded_S[:rows] = slot_S
        padded_S[rows:] = self._slots.padding
        start = stage.take(bucket)
        start[:rows] = start_S
        start[rows:] = 0
        appended = self._stage_appends(stage)
        inbox = self.staging.send(plan.step, stage.used)
        self._append(inbox, appended)
        return Step(
            plan=plan,
            inputs=None,
            bucket=bucket,
            padded=0,
            row_R=np.arange(rows),
            masked_R=(plan.row_flags_S & RowFlag.MASKED) != 0,
            slot_R=slot_S,
            device_slot_R=Column(0, rows, np.int64).of(inbox),
            position_R=start_S + 1,
            logits_R=None,
            prompts=(),
            length_S=start_S + 1,
        )

    def _general(
        self,
        plan: Plan,
        stage: _Stage,
        slot_S: np.ndarray,
        start_S: np.ndarray,
        length_S: np.ndarray,
    ) -> Step:
        """A step of any rows."""
        end_S = start_S + length_S
        last_S = np.cumsum(length_S)
        tokens = int(last_S[-1]) if last_S.size else 0
        first_S = last_S - length_S
        is_from_slot_S = (plan.row_flags_S & RowFlag.FROM_SLOT) != 0
        is_sampled_S = (plan.row_flags_S & RowFlag.SAMPLE) != 0
        if tokens == slot_S.size:  # Pure decode: one token a row.
            position_T, from_slot_T = start_S, is_from_slot_S
            slot_T = slot_S
        else:
            row_T = np.repeat(np.arange(slot_S.size), length_S)
            position_T = np.arange(tokens) + (start_S - first_S)[row_T]
            from_slot_T = is_from_slot_S[row_T]
            slot_T = slot_S[row_T]
        block_T = self._slots.table_ZW[slot_T, position_T // self._block_tokens]
        row_R = np.flatnonzero(is_sampled_S)
        prompts, logits_L, logits_R = _logits(plan, row_R, first_S, last_S, start_S)

        given_T = self._given(plan, tokens - int(from_slot_T.sum()))
        padded = _at_least(self._sizes.tokens, tokens) if tokens else 0
        at_tokens, at_positions, at_cells = self._stage_tokens(
            stage, max(padded, tokens), given_T, from_slot_T, position_T, block_T
        )
        at_logits = stage.put(logits_L)
        at_slots = stage.put(slot_S)
        slot_R = slot_S[row_R]
        at_sampled_slots = stage.put(slot_R)
        at_logits_R = None if logits_R is None else stage.put(logits_R)
        at_rows = stage.put(np.flatnonzero(is_from_slot_S))
        at_firsts = stage.put(first_S[is_from_slot_S])
        at_ends = stage.put(end_S, np.int32)
        at_first_S1 = stage.put(np.concatenate(([0], last_S)), np.int32)
        appended = self._stage_appends(stage)
        inbox = self.staging.send(plan.step, stage.used)

        self._append(inbox, appended)
        device_slot_S = at_slots.of(inbox)
        device_tokens_T = at_tokens.of(inbox)
        if is_from_slot_S.any():  # The slots' last tokens never leave the device.
            slot_F = device_slot_S.index_select(0, at_rows.of(inbox))
            last_F = self._slots.last_tokens(slot_F)
            device_tokens_T.index_copy_(0, at_firsts.of(inbox), last_F)
        width = -(-int(end_S.max(initial=1)) // self._block_tokens)
        shape = StepShape(
            row_start_S=start_S.astype(np.int32),
            row_len_S=plan.row_len_S,
            table_SB=self._slots.tables(device_slot_S, width),
            block_tokens=self._block_tokens,
            kv_len_S=at_ends.of(inbox),
            first_S1=at_first_S1.of(inbox),
            decode_rows=_leading_ones(plan.row_len_S),
        )
        context = StepContext(
            positions_T=at_positions.of(inbox),
            cells_T=at_cells.of(inbox),
            sampled_S=at_logits.of(inbox),
            attention=self._attention.plan(shape),
            kv=self._pool,
        )
        return Step(
            plan=plan,
            inputs=Inputs(device_tokens_T, context),
            bucket=0,
            padded=padded,
            row_R=row_R,
            masked_R=(plan.row_flags_S[row_R] & RowFlag.MASKED) != 0,
            slot_R=slot_R,
            device_slot_R=at_sampled_slots.of(inbox),
            position_R=end_S[row_R],
            logits_R=None if at_logits_R is None else at_logits_R.of(inbox),
            prompts=prompts,
            length_S=end_S,
        )

    def _stage_tokens(
        self,
        stage: _Stage,
        padded: int,
        given_T: np.ndarray,
        from_slot_T: np.ndarray,
        position_T: np.ndarray,
        block_T: np.ndarray,
    ) -> tuple[Column, Column, Column]:
        """Stages tokens, positions and cells; padding ones are token 0, at position 0, in scrap."""
        tokens = position_T.size
        tokens_T = stage.take(padded)
        at_tokens = stage.last
        tokens_T[tokens:] = 0
        tokens_T[:tokens][~from_slot_T] = given_T
        positions_T = stage.take(padded)
        at_positions = stage.last
        positions_T[tokens:] = 0
        positions_T[:tokens] = position_T
        cells_T = stage.take(padded)
        cells_T[tokens:] = 0
        np.multiply(block_T, self._block_tokens, out=cells_T[:tokens])
        cells_T[:tokens] += position_T % self._block_tokens
        return at_tokens, at_positions, stage.last

    def _stage_appends(self, stage: _Stage) -> tuple[Column, Column] | None:
        """Stages what the plan added to tables that the device has a copy of."""
        added = self._slots.take_appended()
        if added is None:
            return None
        return stage.put(added.cells), stage.put(added.blocks, np.int32)

    def _append(self, inbox: Tensor, appended: tuple[Column, Column] | None) -> None:
        if appended is not None:
            cells, blocks = (column.of(inbox) for column in appended)
            self._slots.append_on_device(cells, blocks)

    def _starts(self, plan: Plan, slot_S: np.ndarray) -> np.ndarray:
        start_S = plan.row_start_S.astype(np.int64)
        if not slot_S.size:
            return start_S
        self._slots.check_bound(plan.step, slot_S)
        at_length_S = (plan.row_flags_S & RowFlag.START_AT_LENGTH) != 0
        if at_length_S.any():
            start_S[at_length_S] = self._slots.length_Z[slot_S[at_length_S]]
        return start_S

    def _check(
        self, plan: Plan, slot_S: np.ndarray, length_S: np.ndarray, end_S: np.ndarray
    ) -> None:
        if not slot_S.size:
            return
        if slot_S.size > self._rows_max or int(length_S.sum()) > self._tokens_max:
            raise PlanError(
                f"step {plan.step} has {slot_S.size} rows and {int(length_S.sum())} tokens; "
                f"{self._rows_max} and {self._tokens_max} were prepared"
            )
        if length_S.min() < 1 or plan.row_start_S.min() < 0:
            raise PlanError(f"step {plan.step} has a row without tokens or before position 0")
        if (end_S > self._slots.blocks_Z[slot_S] * self._block_tokens).any():
            raise PlanError(f"step {plan.step} writes beyond the blocks of a slot")
        drawn = RowFlag.MASKED | RowFlag.SAMPLE
        if ((plan.row_flags_S & drawn) == RowFlag.MASKED).any():
            raise PlanError(f"step {plan.step} has a row that waits for a mask and draws nothing")

    def _given(self, plan: Plan, expected: int) -> np.ndarray:
        """The tokens that the plan brings along."""
        token = plan.token_id
        if token.size != expected:
            raise PlanError(f"step {plan.step} brings {token.size} tokens for {expected}")
        if token.size and not 0 <= token.min() <= token.max() < self._vocab_size:
            raise PlanError(f"step {plan.step} brings tokens outside the vocabulary")
        return token

    def _zero(self, plan: Plan) -> None:
        if not 1 <= plan.zero_block.min() <= plan.zero_block.max() < self._pool.blocks:
            raise PlanError(f"step {plan.step} zeroes a block outside the pool")
        self._pool.zero(self._device.to_device(plan.zero_block.astype(np.int64)))


@dataclass(frozen=True)
class Column:
    """Where a staged column lies."""

    at: int  # bytes
    count: int
    dtype: type[np.generic]

    def of(self, inbox: Tensor) -> Tensor:
        """The column on the device."""
        size = self.count * np.dtype(self.dtype).itemsize
        return inbox[self.at : self.at + size].view(_TORCH[self.dtype])

    def of_host(self, host: np.ndarray) -> np.ndarray:
        """The column in a copy of the bytes."""
        size = self.count * np.dtype(self.dtype).itemsize
        return host[self.at : self.at + size].view(self.dtype)


_TORCH: dict[type[np.generic], torch.dtype] = {
    np.int64: torch.int64,
    np.int32: torch.int32,
    np.float32: torch.float32,
    np.bool_: torch.bool,
}
# Columns begin at multiples of this many bytes.
_ALIGNMENT = 8


class _Stage:
    """A staging buffer that is filled from the front."""

    def __init__(self, host: np.ndarray) -> None:
        self._host = host
        self.used = 0  # bytes
        self.last = Column(0, 0, np.int64)  # the column taken last

    def take(self, count: int, dtype: type[np.generic] = np.int64) -> np.ndarray:
        """The next column, to be filled."""
        size = count * np.dtype(dtype).itemsize
        self.last = Column(self.used, count, dtype)
        taken = self._host[self.used : self.used + size].view(dtype)
        self.used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return taken

    def put(self, values: np.ndarray, dtype: type[np.generic] = np.int64) -> Column:
        """Fills the next column."""
        self.take(values.size, dtype)[:] = values
        return self.last


def _at_least(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest size that holds so many; 0 if none does."""
    at = bisect.bisect_left(sizes, wanted)
    return sizes[at] if at < len(sizes) else 0


def _leading_ones(length_S: np.ndarray) -> int:
    """How many of the first rows have one token."""
    longer = np.flatnonzero(length_S != 1)
    return int(longer[0]) if longer.size else length_S.size


def _logits(
    plan: Plan,
    row_R: np.ndarray,
    first_S: np.ndarray,
    last_S: np.ndarray,
    start_S: np.ndarray,
) -> tuple[tuple[PromptRow, ...], np.ndarray, np.ndarray | None]:
    """Which tokens' logits are wanted.

    Returns: the rows that want their own tokens' log-probabilities; the wanted tokens, indices in
    T; and which of their logits are drawn from, None for all.
    """
    if not (plan.row_flags_S & RowFlag.PROMPT_LOGPROBS).any():
        return (), last_S[row_R] - 1, None
    prompts: list[PromptRow] = []
    wanted: list[np.ndarray] = []
    drawn: list[int] = []
    count = 0
    for row, flags in enumerate(plan.row_flags_S.tolist()):
        first, last = int(first_S[row]), int(last_S[row])
        is_sampled = bool(flags & RowFlag.SAMPLE)
        if flags & RowFlag.PROMPT_LOGPROBS:
            slot, start = int(plan.row_slot_S[row]), int(start_S[row])
            prompts.append(PromptRow(slot, start, first, last - first, count, is_sampled))
        elif is_sampled:
            first = last - 1
        else:
            continue
        wanted.append(np.arange(first, last))
        count += last - first
        if is_sampled:
            drawn.append(count - 1)
    return tuple(prompts), np.concatenate(wanted), np.array(drawn, np.int64)

"""From a plan to what the model is called with: staged on the host, copied once, then shaped."""

# S rows of the plan · T query tokens · R sampled rows · P tokens per block · W table entries

from __future__ import annotations

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

# Staged int64 columns: token, position, cell and logits index a token; slot and slot of the
# sampled rows a row.
TOKEN_COLUMNS = 4
ROW_COLUMNS = 2


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
class Step:
    """A plan, ready to be launched."""

    plan: Plan
    tokens_T: Tensor
    context: StepContext
    row_R: np.ndarray  # int64: the sampled rows of the plan
    slot_R: np.ndarray  # int64, host
    device_slot_R: Tensor
    position_R: np.ndarray  # int64: where the drawn tokens will be
    logits_R: Tensor | None  # which logits are drawn from; None: all of them
    prompts: tuple[PromptRow, ...]
    length_S: np.ndarray  # int64: the slots' lengths after the step


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
    ) -> None:
        self._device = device
        self._slots = slots
        self._pool = pool
        self._attention = attention
        self._tokens_max = step_tokens_max
        self._rows_max = step_rows_max
        self._vocab_size = vocab_size
        self._block_tokens = pool.layout.block_tokens
        length = TOKEN_COLUMNS * step_tokens_max + ROW_COLUMNS * step_rows_max
        self._stages = [device.host_buffer(length, torch.int64) for _ in range(STAGES)]

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

        last_S = np.cumsum(length_S)
        tokens = int(last_S[-1]) if last_S.size else 0
        first_S = last_S - length_S
        is_from_slot_S = (plan.row_flags_S & RowFlag.FROM_SLOT) != 0
        is_sampled_S = (plan.row_flags_S & RowFlag.SAMPLE) != 0
        if tokens == slot_S.size:  # Pure decode: one token a row.
            row_T, position_T, from_slot_T = None, start_S, is_from_slot_S
            slot_T = slot_S
        else:
            row_T = np.repeat(np.arange(slot_S.size), length_S)
            position_T = np.arange(tokens) + (start_S - first_S)[row_T]
            from_slot_T = is_from_slot_S[row_T]
            slot_T = slot_S[row_T]
        block_T = self._slots.table_ZW[slot_T, position_T // self._block_tokens]
        row_R = np.flatnonzero(is_sampled_S)
        prompts, logits_L, logits_R = _logits(plan, row_R, first_S, last_S, start_S)

        stage = _Stage(self._stages[plan.step % STAGES])
        token_T = stage.take(tokens)
        token_T[~from_slot_T] = self._given(plan, tokens - int(from_slot_T.sum()))
        stage.put(position_T)
        cell_T = stage.take(tokens)
        np.multiply(block_T, self._block_tokens, out=cell_T)
        cell_T += position_T % self._block_tokens
        stage.put(logits_L)
        stage.put(slot_S)
        slot_R = slot_S[row_R]
        stage.put(slot_R)
        device = self._device.upload(stage.used())
        tokens_T, positions_T, cells_T, sampled_L, device_slot_S, device_slot_R = device.split(
            [tokens, tokens, tokens, logits_L.size, slot_S.size, slot_R.size]
        )
        tokens_T = self._from_slots(tokens_T, device_slot_S, is_from_slot_S, first_S)
        width = -(-int(end_S.max(initial=1)) // self._block_tokens)
        shape = StepShape(
            row_start_S=start_S.astype(np.int32),
            row_len_S=plan.row_len_S,
            table_SB=self._slots.tables(device_slot_S, width),
            block_tokens=self._block_tokens,
        )
        context = StepContext(
            positions_T=positions_T,
            cells_T=cells_T,
            sampled_S=sampled_L,
            attention=self._attention.plan(shape),
            kv=self._pool,
        )
        return Step(
            plan=plan,
            tokens_T=tokens_T,
            context=context,
            row_R=row_R,
            slot_R=slot_R,
            device_slot_R=device_slot_R,
            position_R=end_S[row_R],
            logits_R=None if logits_R is None else torch.from_numpy(logits_R).to(device.device),
            prompts=prompts,
            length_S=end_S,
        )

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
        if (plan.row_flags_S & RowFlag.MASKED).any():
            raise PlanError(f"step {plan.step} has constrained rows, which are not served yet")

    def _given(self, plan: Plan, expected: int) -> np.ndarray:
        """The tokens that the plan brings along."""
        token = plan.token_id
        if token.size != expected:
            raise PlanError(f"step {plan.step} brings {token.size} tokens for {expected}")
        if token.size and not 0 <= token.min() <= token.max() < self._vocab_size:
            raise PlanError(f"step {plan.step} brings tokens outside the vocabulary")
        return token

    def _from_slots(
        self, tokens_T: Tensor, slot_S: Tensor, is_from_slot_S: np.ndarray, first_S: np.ndarray
    ) -> Tensor:
        """Puts the slots' last tokens where rows ask for them; they never leave the device."""
        if is_from_slot_S.all() and tokens_T.numel() == is_from_slot_S.size:
            return self._slots.last_tokens(slot_S)
        if is_from_slot_S.any():
            rows = torch.from_numpy(np.flatnonzero(is_from_slot_S)).to(tokens_T.device)
            at = torch.from_numpy(first_S[is_from_slot_S]).to(tokens_T.device)
            tokens_T.index_copy_(0, at, self._slots.last_tokens(slot_S.index_select(0, rows)))
        return tokens_T

    def _zero(self, plan: Plan) -> None:
        if not 1 <= plan.zero_block.min() <= plan.zero_block.max() < self._pool.blocks:
            raise PlanError(f"step {plan.step} zeroes a block outside the pool")
        blocks = torch.from_numpy(plan.zero_block.astype(np.int64))
        self._pool.zero(blocks.to(self._device.torch_device))


class _Stage:
    """A staging buffer that is filled from the front."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._host = buffer.numpy()
        self._used = 0

    def take(self, count: int) -> np.ndarray:
        taken = self._host[self._used : self._used + count]
        self._used += count
        return taken

    def put(self, column: np.ndarray) -> None:
        self.take(column.size)[:] = column

    def used(self) -> Tensor:
        return self._buffer[: self._used]


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

"""Made-up plans that reach everything a real one can: what is lazily loaded is loaded by them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.wire import Binding, Plan, RowFlag, Sampling

if TYPE_CHECKING:
    from headrace.engine import Preparation

# One row of each path through the sampler.
VARIANTS = (
    Sampling(),
    Sampling(temperature=0.7, top_k=50, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, typical_p=0.9),
    Sampling(top_n=5),
    Sampling(temperature=1.0, logprob_raw=True, bias_token=(0,), bias=(-1.0,)),
    Sampling(repetition_penalty=1.1, frequency_penalty=0.1, tokens_min=8, ending_token=(0,)),
    Sampling(temperature=1.0, watermark=True),
)


# Rows more than any kernel is compiled for as "few"; more than so many decode beside a prompt once.
CROWD = 72

# Tokens of the prompt's chunks in mixed steps.
CHUNK = 2
# Tokens that steps after the first add to a row which is not the first, at most.
LATER = 4


def warm_plans(
    wanted: Preparation, context_tokens_max: int, crowd: int = 0
) -> tuple[list[Plan], int]:
    """Largest prefill chunks beside short ones, of which one is told of, then decode steps, alone
    and beside a chunk.

    Args:
        crowd: rows of these steps at least, where kernels differ by the number of rows.

    Returns: the plans, and how many blocks they need, scrap included.
    """
    rows = min(
        max(len(VARIANTS), crowd),
        *(wanted.slots_max, wanted.step_rows_max, wanted.step_tokens_max),
    )
    variants = [v for v in VARIANTS if wanted.state_slots_max or not v.needs_history()]
    told = max(
        0,
        min(
            wanted.prompt_logprob_tokens_max,
            wanted.step_tokens_max - (rows - 1),
            context_tokens_max - 1 - LATER,
        ),
    )
    # The last row is told of; a row that is the only one later, when it has been the longest.
    alone = told if rows == 1 else 0
    length_S = np.ones(rows, np.int32)
    length_S[-1] = max(told, 1)
    # Later steps add a token to every row, and two chunks to the first.
    room = context_tokens_max - 1 - 2 * CHUNK
    mixes = rows > 1 and room > 0 and wanted.step_tokens_max > rows + CHUNK
    longest = min(
        wanted.step_tokens_max - int(length_S[1:].sum()),
        room if mixes else max(context_tokens_max - 1 - alone, 1),
    )
    length_S[0] = longest
    ends_S = length_S + LATER
    ends_S[0] = longest + 1 + 2 * CHUNK + alone
    ends_S = np.minimum(ends_S, context_tokens_max)
    block_S = -(-ends_S // wanted.block_tokens)
    blocks = int(block_S.sum()) + 1
    steps = _Steps(wanted.first_step, rows)
    slot_S = np.arange(rows)
    one_S = np.ones(rows, np.int32)
    steps.add(
        slot_S,
        length_S,
        tells=told > alone,
        bindings=[
            Binding(slot, 0, variants[slot % len(variants)], NO_TOKEN, int(length_S[slot]), 0)
            for slot in range(rows)
        ],
        append_slot=slot_S.astype(np.int32),
        append_at=np.zeros(rows, np.int32),
        append_len=block_S.astype(np.int32),
        append_block=np.arange(1, blocks, dtype=np.int32),
    )
    steps.add(slot_S, one_S, zero_block=np.array([blocks - 1], np.int32))
    if mixes:
        # Decode rows come first, as the router puts them.
        steps.add(np.roll(slot_S, -1), np.append(one_S[1:], np.int32(CHUNK)))
        steps.add(np.array([1, 0]), np.array([1, CHUNK], np.int32))
    if alone:
        steps.add(slot_S, np.array([alone], np.int32), tells=True)
    return steps.plans, blocks


NO_TOKEN = np.zeros(1, np.int32)
NO_INTS = np.zeros(0, np.int32)


class _Steps:
    """Plans in order, for slots whose lengths it knows."""

    def __init__(self, first_step: int, slots: int) -> None:
        self.plans: list[Plan] = []
        self._step = first_step
        self._length_Z = np.zeros(slots, np.int32)

    def add(
        self, slot_S: np.ndarray, length_S: np.ndarray, tells: bool = False, **columns: Any
    ) -> None:
        """A plan of rows that are all sampled, each where its slot's last one ended.

        Rows of one token take the one that was drawn; all other tokens are 0.

        Args:
            tells: whether log-probabilities of the last row's tokens are told.
        """
        start_S = self._length_Z[slot_S]
        from_slot_S = (length_S == 1) & (start_S > 0)
        from_slot_S[-1] &= not tells  # whose tokens are a prompt's
        flag_S = np.full(slot_S.size, int(RowFlag.SAMPLE), np.int32)
        flag_S[from_slot_S] |= int(RowFlag.FROM_SLOT)
        if tells:
            flag_S[-1] |= int(RowFlag.PROMPT_LOGPROBS)
        values: dict[str, Any] = {field.name: NO_INTS for field in dataclasses.fields(Plan)}
        values |= {"step": self._step, "data": b"", "bindings": [], "trace_context": b""}
        values |= {
            "row_slot_S": slot_S.astype(np.int32),
            "row_start_S": start_S,
            "row_len_S": length_S,
            "row_flags_S": flag_S,
            "token_id": np.zeros(int(length_S[~from_slot_S].sum()), np.int32),
        }
        self.plans.append(Plan(**(values | columns)))
        self._length_Z[slot_S] += length_S
        self._step += 1

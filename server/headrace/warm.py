"""Made-up plans that reach everything a real one can: what is lazily loaded is loaded by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headrace.wire import Binding, Plan, RowFlag, Sampling

if TYPE_CHECKING:
    from headrace.executor import Preparation

# One row of each path through the sampler.
VARIANTS = (
    Sampling(),
    Sampling(temperature=0.7, top_k=50, top_p=0.9),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, typical_p=0.9),
    Sampling(top_n=5),
    Sampling(temperature=1.0, logprob_raw=True, bias_token=(0,), bias=(-1.0,)),
    Sampling(repetition_penalty=1.1, frequency_penalty=0.1, tokens_min=8, ending_token=(0,)),
)


def warm_plans(wanted: Preparation, context_tokens_max: int) -> tuple[list[Plan], int]:
    """A largest prefill chunk beside short ones, then a decode step of all its rows.

    Returns: the plans, and how many blocks they need, scrap included.
    """
    rows = min(len(VARIANTS), wanted.slots_max, wanted.step_rows_max, wanted.step_tokens_max)
    variants = [v for v in VARIANTS if wanted.state_slots_max or not v.needs_history()]
    rows = min(rows, len(variants))
    longest = min(wanted.step_tokens_max - (rows - 1), context_tokens_max - 1)
    length_S = np.ones(rows, np.int32)
    length_S[0] = longest
    block_S = -(-(length_S + 1) // wanted.block_tokens)
    blocks = int(block_S.sum()) + 1
    no_ints = np.zeros(0, np.int32)
    slot_S = np.arange(rows, dtype=np.int32)
    prompt = np.zeros(int(length_S.sum()), np.int32)
    bindings = [
        Binding(slot, 0, variants[slot], np.zeros(1, np.int32), int(length_S[slot]), 0)
        for slot in range(rows)
    ]
    first = Plan(
        step=wanted.first_step,
        data=b"",
        release_slot=no_ints,
        bindings=bindings,
        zero_block=no_ints,
        append_slot=slot_S,
        append_at=np.zeros(rows, np.int32),
        append_len=block_S.astype(np.int32),
        append_block=np.arange(1, blocks, dtype=np.int32),
        row_slot_S=slot_S,
        row_start_S=np.zeros(rows, np.int32),
        row_len_S=length_S,
        row_flags_S=np.full(rows, int(RowFlag.SAMPLE), np.int32),
        token_id=prompt,
        trace_row=no_ints,
        trace_context=b"",
    )
    second = Plan(
        step=wanted.first_step + 1,
        data=b"",
        release_slot=no_ints,
        bindings=[],
        zero_block=np.array([blocks - 1], np.int32),
        append_slot=no_ints,
        append_at=no_ints,
        append_len=no_ints,
        append_block=no_ints,
        row_slot_S=slot_S,
        row_start_S=length_S,
        row_len_S=np.ones(rows, np.int32),
        row_flags_S=np.full(rows, int(RowFlag.SAMPLE | RowFlag.FROM_SLOT), np.int32),
        token_id=no_ints,
        trace_row=no_ints,
        trace_context=b"",
    )
    return [first, second], blocks

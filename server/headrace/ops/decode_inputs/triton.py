"""The inputs of a decode step in one launch of Triton, a program a sequence."""

# S sequences of the step · Z slots, the padding one included · W table entries · E head dim
# L positions a model may have

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.decode_inputs.base import DecodeInputs
from headrace.ops.triton import Gpu


# Slices of what a step uploads may begin anywhere: their alignment must not make a new kernel.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["slot_S", "start_S", "last_token_Z", "table_ZW"],
)
def decode_inputs_kernel(
    slot_S,
    start_S,
    last_token_Z,
    table_ZW,
    cos_sin_LE,
    tokens_S,
    positions_S,
    cells_S,
    kv_len_S,
    cos_sin_SE,
    table_stride,
    BLOCK_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two at or above DIM
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    slot = tl.load(slot_S + row)
    start = tl.load(start_S + row)
    token = tl.load(last_token_Z + slot)
    block = tl.load(table_ZW + slot * table_stride + start // BLOCK_TOKENS).to(tl.int64)
    cos_sin = tl.load(cos_sin_LE + start * DIM + i, mask=i < DIM, other=0.0)
    tl.store(tokens_S + row, token)
    tl.store(positions_S + row, start)
    tl.store(cells_S + row, block * BLOCK_TOKENS + start % BLOCK_TOKENS)
    tl.store(kv_len_S + row, (start + 1).to(tl.int32))
    tl.store(cos_sin_SE + row * DIM + i, cos_sin, mask=i < DIM)


class TritonDecodeInputs:
    """A `GatherDecodeInputs`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def __call__(
        self,
        slot_S: Tensor,
        start_S: Tensor,
        last_token_Z: Tensor,
        table_ZW: Tensor,
        cos_sin_LE: Tensor,
        block_tokens: int,
    ) -> DecodeInputs:
        rows, dim = slot_S.shape[0], cos_sin_LE.shape[1]
        assert slot_S.is_contiguous() and start_S.is_contiguous() and cos_sin_LE.is_contiguous()
        assert last_token_Z.is_contiguous() and table_ZW.stride(1) == 1
        made = DecodeInputs(
            tokens_S=torch.empty_like(slot_S),
            positions_S=torch.empty_like(start_S),
            cells_S=torch.empty_like(start_S),
            kv_len_S=torch.empty_like(start_S, dtype=torch.int32),
            cos_sin_SE=cos_sin_LE.new_empty((rows, dim)),
        )
        self._gpu.run(
            decode_inputs_kernel,
            (rows,),
            slot_S,
            start_S,
            last_token_Z,
            table_ZW,
            cos_sin_LE,
            *made,
            table_ZW.stride(0),
            BLOCK_TOKENS=block_tokens,
            DIM=dim,
            BLOCK=triton.next_power_of_2(dim),
            warps=1,
        )
        return made

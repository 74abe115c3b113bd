"""Sum over the ranks and RMS normalisation in Triton: one program a row, through a mailbox.

A program posts its row to the other ranks, waits for theirs, and goes on as `ops/rms_norm` does:
numbers are rounded where the sum, the stream and the norm would be if they were computed apart.
"""

# The types of Triton's language are not those that its kernels are called with.
# pyright: reportArgumentType=false

# T tokens · D width · W words of a row: two numbers of 16 bits each, or one of 32

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.device.peers import Share
from headrace.ops.mailbox import Mailbox, boxes_of, post, receive, unless_own
from headrace.ops.reduce_norm.base import ReduceNorm
from headrace.ops.triton import Gpu

# Rows times ranks that a row is sent to: with more, the bytes count for more than the latency, and
# an all-reduce in two steps sends fewer.
ROWS_SENT_MAX = 256

TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Numbers that a thread holds.
NUMBERS_A_THREAD = 8
WARPS_MAX = 16


@triton.jit
def _unpack(bits, TYPE: tl.constexpr, HALVES: tl.constexpr):
    """The numbers in the low and the high half of each word, float32; 0 where there is no half."""
    if HALVES:
        low = (bits & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
        high = ((bits >> 16) & 0xFFFF).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
    else:
        low = bits.to(tl.float32, bitcast=True)
        high = tl.zeros_like(low)
    return low, high


@triton.jit
def _pack(low, high, TYPE: tl.constexpr, HALVES: tl.constexpr):
    """The inverse of `_unpack`, after rounding."""
    if HALVES:
        low = low.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        bits = (high.to(TYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
    else:
        bits = low.to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _round(x, TYPE: tl.constexpr):
    return x.to(TYPE).to(tl.float32)


@triton.jit(do_not_specialize=["rank"], do_not_specialize_on_alignment=["x_TW"])
def reduce_norm_kernel(
    x_TW,  # int32, as are all of a row's words
    residual_TW,  # overwritten with the stream; read if ADD
    weight_W,
    y_TW,
    box,
    address_R,
    sent,
    rank,
    eps,
    WIDTH: tl.constexpr,  # D
    ROW: tl.constexpr,  # words of a row of the tensors
    BLOCK: tl.constexpr,  # the power of two at or above ROW
    TYPE: tl.constexpr,
    HALVES: tl.constexpr,  # whether a word is two numbers
    ADD: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK)
    inside = word < ROW
    at = row * ROW + word
    if PDL:
        gdc_launch_dependents()
    # Nothing in a step writes these: they are fetched while the kernel before still runs.
    weight = tl.load(weight_W + word, mask=inside, other=0)
    boxes = boxes_of(address_R, RANKS)
    if PDL:
        gdc_wait()
    number = tl.load(sent + row) + 1
    mine = tl.load(x_TW + at, mask=inside, other=0)
    post(boxes, rank, row, number, mine, word, inside, RANKS, ROWS, WORDS, SELF=False)
    residual = tl.zeros_like(mine)
    if ADD:
        residual = tl.load(residual_TW + at, mask=inside, other=0)
    # All have read the number and posted, before it is counted and before they wait.
    tl.debug_barrier()
    tl.store(sent + row, number)

    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        theirs = unless_own(inside, word, rank, peer)
        bits = receive(box, peer, row, number, word, theirs, RANKS, ROWS, WORDS)
        bits = tl.where(rank == peer, mine, bits)
        peer_low, peer_high = _unpack(bits, TYPE, HALVES)
        low += peer_low
        high += peer_high
    low, high = _round(low, TYPE), _round(high, TYPE)
    if ADD:
        residual_low, residual_high = _unpack(residual, TYPE, HALVES)
        low, high = _round(residual_low + low, TYPE), _round(residual_high + high, TYPE)
    tl.store(residual_TW + at, _pack(low, high, TYPE, HALVES), mask=inside)
    mean = tl.sum(low * low + high * high, axis=0) / WIDTH
    scale = tl.rsqrt(mean + eps)
    weight_low, weight_high = _unpack(weight, TYPE, HALVES)
    low = weight_low * _round(low * scale, TYPE)
    high = weight_high * _round(high * scale, TYPE)
    tl.store(y_TW + at, _pack(low, high, TYPE, HALVES), mask=inside)


class TritonReduceNorms:
    """See `MakeReduceNorm`."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        self._gpu = gpu
        self._dtype = dtype
        self._made: dict[int, ReduceNorm | None] = {}

    def __call__(self, share: Share, ranks: int, width: int) -> ReduceNorm | None:
        if width not in self._made:
            self._made[width] = self._make(share, ranks, width)
        return self._made[width]

    def _make(self, share: Share, ranks: int, width: int) -> ReduceNorm | None:
        size = self._dtype.itemsize
        if width * size % 4 != 0:  # A row is not a whole number of words.
            return None
        rows = max(1, ROWS_SENT_MAX // max(1, ranks - 1))
        box = Mailbox.make(share, ranks, rows, width * size // 4)
        return None if box is None else TritonReduceNorm(self._gpu, box)


class TritonReduceNorm:
    """See `ReduceNorm`."""

    def __init__(self, gpu: Gpu, box: Mailbox) -> None:
        self._gpu = gpu
        self._box = box
        self.rows_max = box.rows

    def __call__(
        self, x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, width = x_TD.shape
        assert rows <= self.rows_max and x_TD.dtype == weight_D.dtype
        x_TD = x_TD.contiguous()
        stream_TD = torch.empty_like(x_TD) if residual_TD is None else residual_TD
        assert stream_TD.is_contiguous() and stream_TD.dtype == x_TD.dtype
        y_TD = torch.empty_like(x_TD)
        words = width * x_TD.element_size() // 4
        block = triton.next_power_of_2(words)
        threads = triton.next_power_of_2(width) // NUMBERS_A_THREAD
        self._gpu.run(
            reduce_norm_kernel,
            (rows,),
            *(tensor.view(torch.int32) for tensor in (x_TD, stream_TD, weight_D, y_TD)),
            *self._box.arguments,
            eps,
            WIDTH=width,
            ROW=words,
            BLOCK=block,
            TYPE=TYPES[x_TD.dtype],
            HALVES=x_TD.element_size() == 2,
            ADD=residual_TD is not None,
            **self._box.constants,
            warps=min(max(threads // 32, 1), WARPS_MAX),
        )
        return y_TD, stream_TD

"""One pass over logits in Triton, and the best token of a row from what it leaves.

A row is cut into pieces of one size, whatever the batch: each leaves its maximum, how much its
tokens weigh beside that one, and where it is. So a row's result is the same bits in any company.
"""

# S rows · V vocabulary · C pieces of a row · X chunks of a row (their maxima bound what is best)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Tokens of a piece, and of a chunk whose maximum is kept.
PIECE = 4096
CHUNK = 32

LOG2_E = tl.constexpr(1.4426950408889634)

# 1 / temperature is at most this: a difference of zero stays zero beside it.
INVERSE_MAX = tl.constexpr(1e30)

# `key_of` infinity.
KEY_INF = tl.constexpr(0x7F800000)


@triton.jit
def inverse_of(temperature):
    """1 / temperature; 1 where the best token is taken."""
    warm = tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(1.0 / warm, INVERSE_MAX)


@triton.jit(do_not_specialize=["knob_stride", "group"])
def scan_kernel(
    logits_SV,
    row_stride,
    vocab,
    row_R,  # the row of each program; unused unless CHOSEN
    temperature_S,  # unused unless TEMPERED
    knob_stride,  # entries from one row's temperature to the next one's
    best_SC,  # float32: the piece's maximum
    mass_SC,  # float32: Σ exp((x - maximum) / temperature); 0 of a piece of -inf, NaN of a bad one
    where_SC,  # int32: the first token with the maximum
    maxima_SX,  # float32: the chunks' maxima; unused unless MAXIMA
    pieces,
    group,  # pieces of a program
    PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHOSEN: tl.constexpr,
    TEMPERED: tl.constexpr,
    MAXIMA: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if CHOSEN:
        row = tl.load(row_R + row).to(tl.int64)
    scale = LOG2_E
    if TEMPERED:
        scale = inverse_of(tl.load(temperature_S + row * knob_stride)) * LOG2_E
    chunk = tl.arange(0, PIECE // CHUNK)
    inside = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    first = tl.program_id(0) * group
    logits_V = logits_SV + row * row_stride
    token = first * PIECE + inside
    stop = (first + group) * PIECE
    following = tl.load(logits_V + token, mask=token < vocab, other=-float("inf"))
    for index in range(group):
        x = following.to(tl.float32)
        # The next piece is under way while this one is worked on.
        ahead = token + PIECE
        is_ours = (ahead < vocab) & (ahead < stop)
        following = tl.load(logits_V + ahead, mask=is_ours, other=-float("inf"))
        maxima = tl.max(x, axis=1)
        best = tl.max(maxima, axis=0)
        # A piece without a possible token weighs nothing, rather than NaN.
        beside = tl.where(best == -float("inf"), 0.0, best)
        mass = tl.sum(tl.sum(tl.exp2((x - beside) * scale), axis=1), axis=0)
        where = tl.min(tl.min(tl.where(x == best, token, vocab), axis=1), axis=0)
        piece = first + index
        if piece < pieces:
            at = row * pieces + piece
            tl.store(best_SC + at, best)
            tl.store(mass_SC + at, mass)
            tl.store(where_SC + at, where)
            if MAXIMA:
                tl.store(maxima_SX + at * (PIECE // CHUNK) + chunk, maxima)
        token = ahead


@triton.jit
def pieces_of(best_SC, mass_SC, row, pieces, inverse, PIECES: tl.constexpr):
    """A row's pieces brought together.

    Returns: their maxima; what each weighs beside the row's best token, float64; the row's
    maximum; the row's mass; whether the row is bad.
    """
    piece = tl.arange(0, PIECES)
    at = row * pieces + piece
    maxima = tl.load(best_SC + at, mask=piece < pieces, other=-float("inf"))
    masses = tl.load(mass_SC + at, mask=piece < pieces, other=0.0)
    best = tl.max(maxima, axis=0)
    beside = tl.where(best == -float("inf"), 0.0, best)
    masses = masses.to(tl.float64) * tl.exp((maxima - beside) * inverse).to(tl.float64)
    mass = tl.sum(masses, axis=0)
    # The best token alone weighs 1. NaN compares false; so does what +inf leaves, which is NaN.
    return maxima, masses, best, mass, (mass >= 0.5) == 0  # pyright: ignore[reportOperatorIssue]


@triton.jit
def key_of(x):
    """An int32 in the order of the floats; of -0 and 0 the same. Low bits stay zero where they are.

    So a search over the keys of 16-bit floats needs to look at the high bits only.
    """
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def x_of(key):
    """The float32 that has a key."""
    return tl.where(key < 0, -key | -0x80000000, key).to(tl.float32, bitcast=True)


@triton.jit
def store_frame(frame_SF, row, best, inverse, log_mass, high, low, low_token):
    """What is left of a row's distribution, and how probable its tokens are; float64.

    log p(x) = (x - best) · inverse - log_mass. Left are the logits up to `high` and above `low`,
    and those at `low` up to the id `low_token`: every filter leaves such an interval.
    """
    frame_F = frame_SF + row * 6
    tl.store(frame_F, best.to(tl.float64))
    tl.store(frame_F + 1, inverse)
    tl.store(frame_F + 2, log_mass)
    tl.store(frame_F + 3, high)
    tl.store(frame_F + 4, low)
    tl.store(frame_F + 5, low_token)


@triton.jit
def load_frame(frame_SF, row):
    """What `store_frame` stored."""
    frame_F = frame_SF + row * 6
    return (
        tl.load(frame_F),
        tl.load(frame_F + 1),
        tl.load(frame_F + 2),
        tl.load(frame_F + 3).to(tl.float32),
        tl.load(frame_F + 4).to(tl.float32),
        tl.load(frame_F + 5).to(tl.int32),
    )


@triton.jit(do_not_specialize_on_alignment=["token_S", "logprob_S", "bad_S"])
def best_kernel(
    best_SC,
    mass_SC,
    where_SC,
    row_R,  # unused unless CHOSEN
    slot_S,  # int64; unused unless ACCEPT
    last_token_Z,  # int64
    token_S,
    logprob_S,
    bad_S,
    frame_SF,  # see `store_frame`; unused unless CHOSEN
    vocab,
    pieces,
    PIECES: tl.constexpr,  # the power of two at or above `pieces`
    CHOSEN: tl.constexpr,
    ACCEPT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best token of a row, the first of equals."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if CHOSEN:
        row = tl.load(row_R + row).to(tl.int64)
    maxima, _, best, mass, bad = pieces_of(best_SC, mass_SC, row, pieces, 1.0, PIECES)
    piece = tl.arange(0, PIECES)
    where = tl.load(where_SC + row * pieces + piece, mask=piece < pieces, other=vocab)
    token = tl.min(tl.where(maxima == best, where, vocab), axis=0)
    token = tl.minimum(token, vocab - 1).to(tl.int64)  # A row of NaN has no best token.
    log_mass = tl.log(mass)
    tl.store(token_S + row, token)
    tl.store(logprob_S + row, tl.where(bad, 0.0, 0.0 - log_mass).to(tl.float32))
    tl.store(bad_S + row, bad)
    if ACCEPT:
        tl.store(last_token_Z + tl.load(slot_S + row), token)
    if CHOSEN:
        store_frame(frame_SF, row, best, 1.0, log_mass, float("inf"), -float("inf"), -1)


@triton.jit
def raw_kernel(
    logits_SV,
    row_stride,
    best_SC,
    mass_SC,
    row_R,
    token_S,
    logprob_S,
    frame_SF,  # see `store_frame`
    pieces,
    PIECES: tl.constexpr,
    PDL: tl.constexpr,
):
    """How probable a row's token is by the logits as they were given."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(row_R + tl.program_id(0)).to(tl.int64)
    _, _, best, mass, bad = pieces_of(best_SC, mass_SC, row, pieces, 1.0, PIECES)
    token = tl.load(token_S + row)
    x = tl.load(logits_SV + row * row_stride + token).to(tl.float32)
    log_mass = tl.log(mass)
    logprob = (x - best).to(tl.float64) - log_mass
    tl.store(logprob_S + row, tl.where(bad, 0.0, logprob).to(tl.float32))
    store_frame(frame_SF, row, best, 1.0, log_mass, float("inf"), -float("inf"), -1)

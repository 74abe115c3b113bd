"""Draws in Triton: from the whole vocabulary, or from what the filters leave of it.

A row's filters are searches for thresholds (`search.py`): in a short list of its best tokens where
these suffice, which the device itself finds out, and else in the whole row.
"""

# S rows · V vocabulary · C pieces of a row · L rows with a list · N tokens searched
# R rows of a launch

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.sampling.base import IN_PROMPT, Feature
from headrace.ops.sampling.scan import (
    KEY_INF,
    LOG2_E,
    inverse_of,
    key_of,
    pieces_of,
    store_frame,
    x_of,
)
from headrace.ops.sampling.search import (
    ABOVE_ALL,
    COUNT,
    ENTROPY,
    MASS,
    NEAR,
    SIGN,
    TIES,
    ends,
    exact,
    fold,
    highest,
    nth,
)

_PENALTY = tl.constexpr(int(Feature.PENALTY))
_COUNT_MASK = tl.constexpr(IN_PROMPT - 1)

_LAST_SHARE = tl.constexpr(1 - 2.0**-52)  # a draw's share of the mass stays below the whole


@triton.jit(do_not_specialize=["knob_stride"])
def edit_kernel(
    logits_SV,
    row_stride,
    x_SV,  # float32: the copy to edit
    vocab,
    features_S,
    state_QV,
    state_slot_S,
    repetition_S,
    frequency_S,
    presence_S,
    knob_stride,  # entries from one row's knob to the next one's
    BLOCK: tl.constexpr,
    PENALTY: tl.constexpr,  # whether any row has penalties
    PDL: tl.constexpr,
):
    """Copies logits, with repetition, frequency and presence penalties."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits_SV + row * row_stride + token, mask=inside).to(tl.float32)
    if PENALTY:  # noqa: SIM102 (decided when it is compiled; the inner one on the device)
        if tl.load(features_S + row) & _PENALTY:
            slot = tl.load(state_slot_S + row).to(tl.int64)
            state = tl.load(state_QV + slot * vocab + token, mask=inside, other=0)
            repetition = tl.load(repetition_S + row * knob_stride)
            count = state & _COUNT_MASK
            changed = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
            changed -= tl.load(frequency_S + row * knob_stride) * count.to(tl.float32)
            changed -= tl.where(count > 0, tl.load(presence_S + row * knob_stride), 0.0)
            x = tl.where(state != 0, changed, x)
    tl.store(x_SV + row * vocab + token, x, mask=inside)


@triton.jit(do_not_specialize=["knob_stride"])
def draw_whole_kernel(
    x_SV,
    row_stride,
    vocab,
    best_SC,
    mass_SC,
    row_R,
    temperature_S,
    min_p_S,
    knob_stride,
    uniform_S,
    token_S,
    logprob_S,
    bad_S,
    frame_SF,
    limits_SF,
    pieces,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draws from all tokens that min-p leaves, in the order of ids: first a piece, then a token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(row_R + tl.program_id(0)).to(tl.int64)
    x_V = x_SV + row * row_stride
    inverse = inverse_of(tl.load(temperature_S + row * knob_stride))
    scale = inverse * LOG2_E
    maxima, masses, best, mass, bad = pieces_of(best_SC, mass_SC, row, pieces, inverse, PIECES)
    piece = tl.arange(0, PIECES)
    inside = tl.arange(0, PIECE)
    min_p = tl.load(min_p_S + row * knob_stride)
    floor = scale * 0 - float("inf")
    if min_p > 0:
        floor = _floor(best, min_p, inverse)
        for index in range(pieces):
            weighs = scale * 0
            if tl.load(best_SC + row * pieces + index) >= floor:
                token = index * PIECE + inside
                x = tl.load(x_V + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
                weights = tl.where(x >= floor, tl.exp2((x - best) * scale), 0.0)
                weighs = tl.sum(weights, axis=0)
            masses = tl.where(piece == index, weighs.to(tl.float64), masses)
    masses = exact(masses, PIECES * PIECE)
    mass = tl.sum(masses, axis=0)
    target = tl.minimum(tl.load(uniform_S + row) * mass, mass * _LAST_SHARE)
    chosen = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
    chosen = tl.minimum(chosen, pieces - 1)
    before = tl.sum(tl.where(piece < chosen, masses, 0.0), axis=0)
    own = tl.sum(tl.where(piece == chosen, masses, 0.0), axis=0)
    peak = tl.max(tl.where(piece == chosen, maxima, -float("inf")), axis=0)
    token = chosen * PIECE + inside
    x = tl.load(x_V + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    weights = tl.where(x >= floor, tl.exp2((x - peak) * scale), 0.0)
    weights = exact(weights.to(tl.float64), PIECE)
    own_again = tl.sum(weights, axis=0)
    inner = tl.minimum((target - before) / own * own_again, own_again * _LAST_SHARE)
    reached = tl.sum((tl.cumsum(weights, axis=0) <= inner).to(tl.int32), axis=0)
    token = tl.where(bad, 0, tl.minimum(chosen * PIECE + reached, vocab - 1))
    low = tl.maximum(key_of(floor) - 1, -KEY_INF)
    _tell(x_V, row, token, bad, best, inverse, mass, token_S, logprob_S, bad_S)
    store_frame(frame_SF, limits_SF, row, best, inverse, tl.log(mass), KEY_INF, low, -1)


@triton.jit(do_not_specialize=["knob_stride"])
def draw_filtered_kernel(
    x_SV,
    row_stride,
    vocab,
    best_SC,
    mass_SC,
    row_R,
    list_R,  # which list is the row's
    found_L,
    list_LN,
    list_token_LN,
    top_k_S,
    temperature_S,
    top_p_S,
    typical_p_S,
    min_p_S,
    knob_stride,
    uniform_S,
    token_S,
    logprob_S,
    bad_S,
    frame_SF,
    limits_SF,
    pieces,
    PIECES: tl.constexpr,
    TOKEN_BITS: tl.constexpr,  # ids are below 2 to this power
    LIST: tl.constexpr,
    SHIFT: tl.constexpr,  # how many low bits of a key are zero
    PDL: tl.constexpr,
):
    """Draws from what top-k, top-p, typical-p and min-p leave, best first and equal ones by id."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(row_R + tl.program_id(0)).to(tl.int64)
    at = tl.load(list_R + tl.program_id(0)).to(tl.int64)
    x_V = x_SV + row * row_stride
    list_N = list_LN + at * LIST
    token_N = list_token_LN + at * LIST
    inverse = inverse_of(tl.load(temperature_S + row * knob_stride))
    scale = inverse * LOG2_E
    _, _, best, mass, bad = pieces_of(best_SC, mass_SC, row, pieces, inverse, PIECES)
    top_k = tl.load(top_k_S + row)
    top_p = tl.load(top_p_S + row * knob_stride).to(tl.float64)
    typical_p = tl.load(typical_p_S + row * knob_stride).to(tl.float64)
    min_p = tl.load(min_p_S + row * knob_stride)
    uniform = tl.load(uniform_S + row)
    found = tl.load(found_L + at)
    listed = found <= LIST
    if listed & (top_k == 0) & (top_p < 1):
        # With a margin for what float32 leaves open about the mass of all tokens.
        covered = fold(
            list_N, token_N, found, best, scale, 0.0, KEY_INF, -KEY_INF, -1,
            SIGN, 0, MASS, LIST, True,
        )  # fmt: skip
        listed = (covered >= top_p * mass * (1 + 1e-6)) | (found == vocab)
    token = vocab * 0
    high = vocab * 0 + KEY_INF
    low = -high
    low_token = vocab * 0 - 1
    if bad == 0:
        if listed:
            token, mass, high, low, low_token = _filter_and_draw(
                list_N, token_N, found, best, inverse, top_k, top_p, mass, typical_p, min_p,
                uniform, TOKEN_BITS, LIST, SHIFT, True,
            )  # fmt: skip
        else:
            token, mass, high, low, low_token = _filter_and_draw(
                x_V, token_N, vocab, best, inverse, top_k, top_p, mass, typical_p, min_p,
                uniform, TOKEN_BITS, LIST, SHIFT, False,
            )  # fmt: skip
    token = tl.minimum(token, vocab - 1)
    _tell(x_V, row, token, bad, best, inverse, mass, token_S, logprob_S, bad_S)
    store_frame(frame_SF, limits_SF, row, best, inverse, tl.log(mass), high, low, low_token)


@triton.jit
def _filter_and_draw(
    x_N,
    token_N,
    n,
    best,
    inverse,
    top_k,
    top_p,
    mass,
    typical_p,
    min_p,
    uniform,
    TOKEN_BITS: tl.constexpr,
    LIST: tl.constexpr,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Returns: the token; the mass of what is left; `high`, `low`, `low_token` of `store_frame`."""
    scale = inverse * LOG2_E
    high = n * 0 + KEY_INF
    low = -high
    low_token = n * 0 - 1
    if top_k > 0:
        kth = highest(
            x_N, token_N, n, best, scale, 0.0, high, low, low_token, top_k.to(tl.float64),
            False, COUNT, LIST, SHIFT, LISTED,
        )  # fmt: skip
        low = tl.where(kth > low, kth - 1, low)  # what ties with the k-th stays
    if top_p < 1:
        if (top_k > 0) | (not LISTED):
            mass = fold(
                x_N, token_N, n, best, scale, 0.0, high, low, low_token, SIGN, 0,
                MASS, LIST, LISTED,
            )  # fmt: skip
        # A token stays while what precedes it weighs less than this; the best one always does.
        nucleus = tl.maximum(top_p * mass, 1e-9)
        last, rank = _reach(
            x_N, token_N, n, best, scale, high, low, low_token, nucleus,
            False, LIST, SHIFT, LISTED,
        )  # fmt: skip
        low_token = nth(x_N, token_N, n, last, rank, TOKEN_BITS, LIST, LISTED)
        low = last
    top = best
    if typical_p < 1:
        mass = fold(
            x_N, token_N, n, best, scale, 0.0, high, low, low_token, SIGN, 0,
            MASS, LIST, LISTED,
        )  # fmt: skip
        # A token's surprise is its distance to the best one, and a constant.
        expected = fold(
            x_N, token_N, n, best, scale, 0.0, high, low, low_token, SIGN, 0,
            ENTROPY, LIST, LISTED,
        ) * 0.6931471805599453 / mass  # fmt: skip
        centre = (best.to(tl.float64) - expected / inverse).to(tl.float32)
        near = highest(
            x_N, token_N, n, best, scale, centre, high, low, low_token, typical_p * mass,
            False, NEAR, LIST, 0, LISTED,
        )  # fmt: skip
        top, bottom = ends(
            x_N, token_N, n, centre, high, low, low_token, near, -float("inf"), LIST, LISTED
        )
        high = key_of(top)
        if key_of(bottom) > low:
            low = key_of(bottom) - 1
            low_token = n * 0 - 1
    if min_p > 0:
        least = key_of(_floor(top, min_p, inverse)) - 1
        if least >= low:
            low = least
            low_token = n * 0 - 1
    mass = fold(
        x_N, token_N, n, best, scale, 0.0, high, low, low_token, SIGN, 0, MASS, LIST, LISTED
    )
    target = tl.minimum(uniform * mass, mass * _LAST_SHARE)
    chosen, rank = _reach(
        x_N, token_N, n, best, scale, high, low, low_token, target, True, LIST, SHIFT, LISTED
    )
    token = nth(x_N, token_N, n, chosen, rank, TOKEN_BITS, LIST, LISTED)
    return token, mass, high, low, low_token


@triton.jit
def _reach(
    x_N,
    token_N,
    n,
    best,
    scale,
    high,
    low,
    low_token,
    target,
    STRICT: tl.constexpr,
    LIST: tl.constexpr,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Where the mass, cumulated best first, reaches `target`, or exceeds it where STRICT.

    Returns: the key of the token that does it, and its rank among those with this key.
    """
    key = highest(
        x_N, token_N, n, best, scale, 0.0, high, low, low_token, target,
        STRICT, MASS, LIST, SHIFT, LISTED,
    )  # fmt: skip
    above = fold(
        x_N, token_N, n, best, scale, 0.0, high, low, low_token, key + 1, 0, MASS, LIST, LISTED
    )
    ties = fold(
        x_N,
        token_N,
        n,
        best,
        scale,
        0.0,
        high,
        low,
        low_token,
        key,
        ABOVE_ALL,
        TIES,
        LIST,
        LISTED,
    )
    weight = exact(tl.exp2((x_of(key) - best) * scale).to(tl.float64), LIST)
    share = (target - above) / weight
    rank = tl.floor(share) if STRICT else tl.ceil(share) - 1
    rank = tl.maximum(tl.minimum(rank, ties - 1), 0.0)
    return key, rank


@triton.jit
def _floor(best, min_p, inverse):
    """The logit at which a token is `min_p` as probable as the best one."""
    return (best.to(tl.float64) + tl.log(min_p.to(tl.float64)) / inverse).to(tl.float32)


@triton.jit
def _tell(x_V, row, token, bad, best, inverse, mass, token_S, logprob_S, bad_S):
    """Stores what was drawn for a row."""
    x = tl.load(x_V + token).to(tl.float32)
    logprob = ((x - best) * inverse).to(tl.float64) - tl.log(mass)
    tl.store(token_S + row, token.to(tl.int64))
    tl.store(logprob_S + row, tl.where(bad, 0.0, logprob).to(tl.float32))
    tl.store(bad_S + row, bad)

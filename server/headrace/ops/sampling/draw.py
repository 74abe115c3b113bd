"""Draws in Triton: from the whole vocabulary, or from what the filters leave of it.

One program does all that filters ask of a row: it lists the row's best tokens (`lists.py`), and
searches thresholds among them (`search.py`). Where these do not suffice, which the program finds
out, it narrows the search down by passes over the row.
"""

# S rows · V vocabulary · C pieces of a row · X chunks · N tokens of a list · R rows of a launch

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.sampling.base import IN_PROMPT, Feature
from headrace.ops.sampling.lists import list_best
from headrace.ops.sampling.scan import (
    LOG2_E,
    inverse_of,
    key_of,
    pieces_of,
    store_frame,
    x_of,
)
from headrace.ops.sampling.search import (
    EVERY_ID,
    highest,
    list_between,
    listed,
    lowest,
    measure,
    narrow,
    nth_of_list,
    nth_of_row,
    of_row,
    place_and_weigh,
    reaches,
)
from headrace.ops.sampling.watermark import HASH_KEY, MIX_1, MIX_2, STEP

_WATERMARK = tl.constexpr(int(Feature.WATERMARK))
_PENALTY = tl.constexpr(int(Feature.PENALTY))
_COUNT_MASK = tl.constexpr(IN_PROMPT - 1)
_HASH_KEY = tl.constexpr(HASH_KEY)
_STEP = tl.constexpr(STEP)
_MIX_1 = tl.constexpr(MIX_1)
_MIX_2 = tl.constexpr(MIX_2)

LAST_SHARE = tl.constexpr(1 - 2.0**-52)  # a draw's share of the mass stays below the whole


@triton.jit(do_not_specialize=["knob_stride", "green_below"])
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
    previous_S,  # what the rows' tokens follow
    green_below,  # see `Watermark.threshold`
    delta,
    BLOCK: tl.constexpr,
    PENALTY: tl.constexpr,  # whether any row has penalties
    WATERMARK: tl.constexpr,  # whether any row has a watermark
    PDL: tl.constexpr,
):
    """Copies logits, with watermarks, and repetition, frequency and presence penalties."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits_SV + row * row_stride + token, mask=inside).to(tl.float32)
    if WATERMARK:  # noqa: SIM102 (as below)
        if tl.load(features_S + row) & _WATERMARK:
            is_green = _is_green(tl.load(previous_S + row), token, green_below)
            x += tl.where(is_green, delta, 0.0)
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


@triton.jit
def _is_green(previous, token, green_below):
    """See `watermark.py`."""
    seed = _mix(previous.to(tl.uint32) * _HASH_KEY)
    found = _mix(seed + (token + 1).to(tl.uint32) * _STEP)
    return (found >> 1).to(tl.int32) < green_below


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * _MIX_1
    x = (x ^ (x >> 13)) * _MIX_2
    return x ^ (x >> 16)


@triton.jit
def mask_kernel(
    x_SV,  # float32: changed
    vocab,
    row_M,
    bits_MW,
    words,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Makes tokens impossible that a row's mask does not allow. A number that is none stays, so
    that the row is bad (R10)."""
    at = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x_V = x_SV + tl.load(row_M + at) * vocab
    word = tl.load(bits_MW + at * words + token // 32, mask=inside, other=0)
    x = tl.load(x_V + token, mask=inside, other=0.0)
    is_allowed = ((word >> (token % 32)) & 1) != 0
    is_bad = (x != x) | (x == float("inf"))  # noqa: PLR0124 (only NaN differs from itself)
    tl.store(x_V + token, tl.where(is_allowed | is_bad, x, -float("inf")), mask=inside)


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
    min_p = tl.load(min_p_S + row * knob_stride)
    floor = scale * 0 - float("inf")
    if min_p > 0:
        floor = _floor(best, min_p, inverse)
        masses = _masses_above(
            x_V, vocab, best_SC + row * pieces, pieces, floor, best, scale, masses, PIECES, PIECE
        )
    masses = exact(masses, PIECES * PIECE)
    mass = tl.sum(masses, axis=0)
    target = tl.minimum(tl.load(uniform_S + row) * mass, mass * LAST_SHARE)
    token = token_at(x_V, vocab, maxima, masses, pieces, target, floor, scale, PIECES, PIECE)
    token = tl.where(bad, 0, token)
    last = tl.where(floor > -float("inf"), EVERY_ID, -1)  # of those at the floor
    _tell(x_V, row, token, bad, best, inverse, mass, token_S, logprob_S, bad_S)
    store_frame(frame_SF, row, best, inverse, tl.log(mass), float("inf"), floor, last)


@triton.jit
def token_at(
    x_V, vocab, maxima, masses, pieces, target, floor, scale,
    PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The token at which what tokens weigh, added up in the order of ids, passes `target`.

    Args:
        maxima, masses: of the row's pieces, the masses `exact`.
        floor: logits below it weigh nothing.
        scale: 1 / temperature, for powers of two.
    """
    piece = tl.arange(0, PIECES)
    chosen = tl.sum((tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
    chosen = tl.minimum(chosen, pieces - 1)
    before = tl.sum(tl.where(piece < chosen, masses, 0.0), axis=0)
    own = tl.sum(tl.where(piece == chosen, masses, 0.0), axis=0)
    peak = tl.max(tl.where(piece == chosen, maxima, -float("inf")), axis=0)
    x = of_row(x_V, vocab, chosen * PIECE + tl.arange(0, PIECE))
    weights = tl.where(x >= floor, tl.exp2((x - peak) * scale), 0.0)
    weights = exact(weights.to(tl.float64), PIECE)
    own_again = tl.sum(weights, axis=0)
    inner = tl.minimum((target - before) / own * own_again, own_again * LAST_SHARE)
    reached = tl.sum((tl.cumsum(weights, axis=0) <= inner).to(tl.int32), axis=0)
    return tl.minimum(chosen * PIECE + reached, vocab - 1)


@triton.jit
def _masses_above(
    x_V, vocab, best_C, pieces, floor, best, scale, masses,
    PIECES: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """What the tokens of each piece weigh, beside the row's best one, that reach a floor."""
    piece = tl.arange(0, PIECES)
    inside = tl.arange(0, PIECE)
    for index in range(pieces):
        weighs = scale * 0
        if tl.load(best_C + index) >= floor:
            x = of_row(x_V, vocab, index * PIECE + inside)
            weights = tl.where(x >= floor, tl.exp2((x - best) * scale), 0.0)
            weighs = tl.sum(weights, axis=0)
        masses = tl.where(piece == index, weighs.to(tl.float64), masses)
    return masses


@triton.jit(do_not_specialize=["knob_stride"])
def draw_filtered_kernel(
    x_SV,
    row_stride,
    vocab,
    best_SC,
    mass_SC,
    maxima_SX,
    maxima_stride,
    row_R,
    list_RN,  # int32: room for two lists a row
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
    pieces,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LIST: tl.constexpr,
    CANDIDATES: tl.constexpr,  # how many of the best tokens a row without top-k is given
    SHIFT: tl.constexpr,  # how many low bits of a logit's key are zero
    PDL: tl.constexpr,
):
    """Draws from what top-k, top-p, typical-p and min-p leave, best first and equal ones by id."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(row_R + at).to(tl.int64)
    x_V = x_SV + row * row_stride
    list_N = list_RN + at * (2 * LIST)
    inverse = inverse_of(tl.load(temperature_S + row * knob_stride))
    _, _, best, mass, bad = pieces_of(best_SC, mass_SC, row, pieces, inverse, PIECES)
    top_k = tl.minimum(tl.load(top_k_S + row), vocab).to(tl.int32)
    top_p = tl.load(top_p_S + row * knob_stride).to(tl.float64)
    typical_p = tl.load(typical_p_S + row * knob_stride).to(tl.float64)
    min_p = tl.load(min_p_S + row * knob_stride)
    uniform = tl.load(uniform_S + row)
    left = (best * 0 + float("inf"), best * 0 - float("inf"), vocab * 0 - 1)
    token = vocab * 0
    if bad == 0:
        # Typical-p alone looks at every token.
        wanted = tl.where(top_k > 0, top_k, tl.where(top_p < 1, CANDIDATES, vocab))
        bound, found = list_best(
            x_V, vocab, maxima_SX + row * maxima_stride, wanted, list_N, CHUNK, CHUNKS, LIST, SHIFT
        )
        token, mass, high, low, low_token = _filter_and_draw(
            x_V, vocab, list_N, bound, found, best, inverse, mass,
            (top_k, top_p, typical_p, min_p, uniform), LIST, SHIFT,
        )  # fmt: skip
        left = (high, low, low_token)
    _tell(x_V, row, token, bad, best, inverse, mass, token_S, logprob_S, bad_S)
    store_frame(frame_SF, row, best, inverse, tl.log(mass), left[0], left[1], left[2])


@triton.jit
def _filter_and_draw(
    x_V, vocab, list_N, bound, found, best, inverse, mass, knobs,
    LIST: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """One search after the other, by the same code: top-k, top-p, typical-p and the draw.

    Returns: the token; the mass of what is left; `high`, `low`, `low_token` of `store_frame`.
    """
    top_k, top_p, typical_p, min_p, uniform = knobs
    scale = inverse * LOG2_E
    high = best * 0 + float("inf")
    low = best * 0 - float("inf")
    low_token = vocab * 0 - 1
    token = vocab * 0
    for search in range(4):
        filters = ((search == 0) & (top_k > 0)) | ((search == 1) & (top_p < 1))
        near = (search == 2) & (typical_p < 1)
        draws = search == 3
        if draws & (min_p > 0):
            floor = _floor(tl.minimum(best, high), min_p, inverse)
            mass = tl.where(floor > low, -1.0, mass)
            low_token = tl.where(floor > low, EVERY_ID, low_token)
            low = tl.maximum(low, floor)
        if filters | near | draws:
            left = (high, low, low_token)
            holds = (found <= LIST) & (low >= bound)
            centre = best * 0
            if near | ((mass < 0) & (search > 0)):
                mass, surprise, _, _ = measure(
                    x_V, vocab, list_N, found, holds, left, best, float("inf"), (best, scale), LIST
                )
                # A token's surprise is its distance to the best one, and a constant.
                expected = surprise * 0.6931471805599453 / mass
                centre = (best.to(tl.float64) - expected / inverse).to(tl.float32)
            target = _target(search, mass, top_k, top_p, typical_p, uniform)
            place, above, rank, token = _reach(
                x_V, vocab, list_N, bound, found, holds, left, (near, centre),
                (best, tl.where(search == 0, 0.0, scale)), inverse, mass, target, draws,
                LIST, SHIFT,
            )  # fmt: skip
            if near:
                mass, _, high, bottom = measure(
                    x_V, vocab, list_N, found, holds, left, centre, -place, (best, scale), LIST
                )
                low_token = tl.where(bottom > low, EVERY_ID, low_token)
                low = tl.maximum(low, bottom)
            elif filters:
                low = place
                low_token = tl.where(search == 0, EVERY_ID, token)  # what ties with the k-th stays
                own = tl.exp2((place - best) * scale).to(tl.float64)
                mass = tl.where(search == 0, -1.0, above + (rank + 1) * own)
    return tl.minimum(token, vocab - 1), mass, high, low, low_token


@triton.jit
def _target(search, mass, top_k, top_p, typical_p, uniform):
    """What the tokens before the end of a search weigh, or how many they are; float64."""
    # A token stays while what precedes it weighs less than this; the best one always does.
    nucleus = tl.maximum(top_p * mass, 1e-9)
    target = tl.where(search == 0, top_k.to(tl.float64), nucleus)
    target = tl.where(search == 2, typical_p * mass, target)
    return tl.where(search == 3, tl.minimum(uniform * mass, mass * LAST_SHARE), target)


@triton.jit
def _placed(x_V, list_N, n, left, order, warp, LIST: tl.constexpr):
    """A list's tokens in the order of a search, what they weigh, and their ids."""
    x, token = listed(x_V, list_N, n, LIST)
    y, weight = place_and_weigh(x, token, left, order, warp)
    return y, weight, token


@triton.jit
def _reach(
    x_V, vocab, list_N, bound, found, holds, left, order, warp, inverse, mass, target, strict,
    LIST: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Where what is cumulated in an order reaches a target.

    Args:
        holds: whether the list of the best tokens holds all that are left.
        order, warp: see `place_and_weigh`.
        mass: of all that are left; unused where tokens are counted.
        strict: whether it has to exceed the target.

    Returns: the place; what stands before it, float64; the rank, among all at this place, of the
    token that reaches the target; and its id.
    """
    near = order[0]
    shift = tl.where(near, 0, SHIFT)
    n = tl.where(found <= LIST, found, 0)
    y, weight, token = _placed(x_V, list_N, n, left, order, warp, LIST)
    before = tl.where(near, 0, tl.sum((y > -float("inf")).to(tl.int32), axis=0))
    above = tl.where(near, 0.0, tl.sum(weight, axis=0).to(tl.float64))
    lo = key_of(tl.min(tl.where(y > -float("inf"), y, float("inf")), axis=0))
    hi = key_of(tl.max(y, axis=0))
    reached = reaches(above, target, strict) & (n > 0) & (near == 0)
    ties = vocab * 0
    if (holds | reached) == 0:
        first = tl.where(near, 0, tl.where(n > 0, key_of(bound) - 1, key_of(warp[0])))
        last = lowest(vocab, left, order, warp, inverse, mass, target)
        lo, hi, above, many = narrow(
            x_V, vocab, left, order, warp, target, strict, last, first, above, before, shift, LIST
        )
        if many > 0:
            list_N += LIST
            n = tl.where(many <= LIST, many, 0)
            ties = tl.where(many <= LIST, 0, many)
            list_between(x_V, vocab, list_N, left, order, warp, lo, hi, LIST)
        else:
            above = above * 0
        y, weight, token = _placed(x_V, list_N, n, left, order, warp, LIST)
        if ties == 0:
            lo = key_of(tl.min(tl.where(y > -float("inf"), y, float("inf")), axis=0))
            hi = key_of(tl.max(y, axis=0))
    else:
        above = above * 0
    place = x_of(highest(y, weight, above, target, strict, lo, hi, shift))
    above += tl.sum(tl.where(y > place, weight, 0.0), axis=0).to(tl.float64)
    own = tl.exp2((place - warp[0]) * warp[1]).to(tl.float64)
    share = (target - above) / own
    rank = tl.where(strict, tl.floor(share), tl.ceil(share) - 1)
    if ties > 0:
        rank = tl.maximum(tl.minimum(rank, ties - 1), 0.0)
        chosen = nth_of_row(x_V, vocab, place, rank.to(tl.int32), LIST)
    else:
        listed_ties = tl.sum((y == place).to(tl.int32), axis=0)
        rank = tl.maximum(tl.minimum(rank, listed_ties - 1), 0.0)
        chosen = nth_of_list(y, token, place, rank.to(tl.int32))
    return place, above, rank, chosen


@triton.jit
def exact(x, BOUND: tl.constexpr):
    """Rounds float64 so that all sums up to BOUND, a power of two, are exact, in any order."""
    return (x + BOUND) - BOUND


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

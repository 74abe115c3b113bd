"""Short lists of a row's best tokens in Triton, and the alternatives that are told from them."""

# S rows · V vocabulary · C pieces of a row · X chunks · L rows with a list · N tokens searched
# R rows of a launch · K alternatives

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.sampling.base import Feature
from headrace.ops.sampling.scan import KEY_INF, key_of
from headrace.ops.sampling.search import ABOVE_ALL, COUNT, SIGN, highest, is_left, tile

# What a list holds at most, and how many of the best tokens a row without top-k is given.
LIST = 4096
CANDIDATES = 1024

_SAMPLED = tl.constexpr(int(Feature.SAMPLED))
_FILTERED = tl.constexpr(int(Feature.FILTERED))
_TYPICAL = tl.constexpr(int(Feature.TYPICAL))

_BELOW_ALL = tl.constexpr(-(1 << 63))  # keys with ids


@triton.jit
def bound_kernel(
    maxima_SX,
    chunks,  # X
    vocab,
    row_L,
    least_L,  # int64: how many of the best tokens a row wants at least
    features_S,  # unused unless FILTERS
    top_k_S,
    bound_L,  # int32: the key that listed tokens reach
    found_L,  # int32: how many tokens are listed; more than a list holds: use the whole row
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FILTERS: tl.constexpr,
    SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Bounds a row's k-th largest logit from below: by the k-th largest maximum of its chunks."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0)
    row = tl.load(row_L + at).to(tl.int64)
    wanted = tl.load(least_L + at)
    if FILTERS:
        features = tl.load(features_S + row)
        if (features & _SAMPLED) != 0:
            if (features & _FILTERED) != 0:
                top_k = tl.load(top_k_S + row)
                wanted = tl.maximum(wanted, tl.where(top_k > 0, top_k, CANDIDATES))
            elif (features & _TYPICAL) != 0:
                wanted = tl.maximum(wanted, vocab)  # looks at every token
    bound = vocab * 0 + SIGN
    found = vocab * 0
    if wanted <= tl.cdiv(vocab, CHUNK):
        bound = highest(
            maxima_SX + row * chunks, maxima_SX, chunks, 0.0, 0.0, 0.0,
            KEY_INF, -KEY_INF, -1, wanted.to(tl.float64),
            False, COUNT, LIST // 4, SHIFT, False,
        )  # fmt: skip
    elif vocab > LIST:
        bound = vocab * 0 + ABOVE_ALL
        found = vocab
    tl.store(bound_L + at, bound)
    tl.store(found_L + at, found)


@triton.jit
def collect_kernel(
    x_SV,
    row_stride,
    vocab,
    best_SC,
    pieces,
    row_L,
    bound_L,
    found_L,
    list_LN,  # float32: the logits of listed tokens, in any order
    list_token_LN,  # int32
    PIECE: tl.constexpr,
    LIST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Lists the tokens of a piece that reach the row's bound."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(1).to(tl.int64)
    row = tl.load(row_L + at).to(tl.int64)
    bound = tl.load(bound_L + at)
    piece = tl.program_id(0)
    if key_of(tl.load(best_SC + row * pieces + piece)) >= bound:
        token = piece * PIECE + tl.arange(0, PIECE)
        x = tl.load(x_SV + row * row_stride + token, mask=token < vocab, other=-float("inf"))
        x = x.to(tl.float32)
        reaches = (key_of(x) >= bound) & (x > -float("inf"))
        rank = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        count = tl.sum(reaches.to(tl.int32), axis=0)
        place = tl.atomic_add(found_L + at, count) + rank
        fits = reaches & (place < LIST)
        tl.store(list_LN + at * LIST + place, x, mask=fits)
        tl.store(list_token_LN + at * LIST + place, token, mask=fits)


@triton.jit(do_not_specialize=["width"])
def alternatives_kernel(
    x_SV,
    row_stride,
    vocab,
    row_R,
    list_R,
    wanted_R,  # int64: alternatives, not counting what ties with the last one
    found_L,
    list_LN,
    list_token_LN,
    frame_SF,  # see `store_frame`
    limits_SF,
    count_R,  # int64
    token_RK,  # int64
    logprob_RK,  # float32
    width,  # K
    LIST: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best tokens of what is left of a row, best first and equal ones by id."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(row_R + at).to(tl.int64)
    list_ = tl.load(list_R + at).to(tl.int64)
    wanted = tl.load(wanted_R + at).to(tl.int32)
    found = tl.load(found_L + list_)
    x_V = x_SV + row * row_stride
    list_N = list_LN + list_ * LIST
    token_N = list_token_LN + list_ * LIST
    token_K = token_RK + at * width
    logprob_K = logprob_RK + at * width
    if found <= LIST:
        count = _tell_best(
            list_N, token_N, found, x_V, row, frame_SF, limits_SF, wanted, token_K, logprob_K,
            width, LIST, True,
        )  # fmt: skip
    else:
        count = _tell_best(
            x_V, token_N, vocab, x_V, row, frame_SF, limits_SF, wanted, token_K, logprob_K,
            width, LIST, False,
        )  # fmt: skip
    tl.store(count_R + at, count.to(tl.int64))


@triton.jit
def _tell_best(
    x_N, token_N, n, x_V, row, frame_SF, limits_SF, wanted, token_K, logprob_K, width,
    LIST: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Stores the best tokens one after the other. Returns: how many."""
    best = tl.load(frame_SF + row * 3)
    inverse = tl.load(frame_SF + row * 3 + 1)
    log_mass = tl.load(frame_SF + row * 3 + 2)
    high = tl.load(limits_SF + row * 3)
    low = tl.load(limits_SF + row * 3 + 1)
    low_token = tl.load(limits_SF + row * 3 + 2)
    i = tl.arange(0, LIST)
    count = n * 0
    last = n * 0
    going = n >= 0
    # A key with an id below it, the smallest id on top: an order without ties.
    before = n.to(tl.int64) * 0 - (_BELOW_ALL + 1)
    while going:
        tops = tl.full([LIST], _BELOW_ALL, tl.int64)
        for first in range(0, n, LIST):
            x, token, key = tile(x_N, token_N, n, first + i, LISTED)
            order = (key.to(tl.int64) << 32) + (ABOVE_ALL - token)
            left = is_left(key, token, high, low, low_token) & (order < before)
            tops = tl.maximum(tops, tl.where(left, order, _BELOW_ALL))
        before = tl.max(tops, axis=0)
        key = (before >> 32).to(tl.int32)
        # What ties with the last one wanted is told too.
        going = (before > _BELOW_ALL) & (count < width) & ((count < wanted) | (key == last))
        if going:
            token = ABOVE_ALL - (before & 0x7FFFFFFF).to(tl.int32)
            x = tl.load(x_V + token).to(tl.float64)
            tl.store(token_K + count, token.to(tl.int64))
            tl.store(logprob_K + count, ((x - best) * inverse - log_mass).to(tl.float32))
            count += 1
        last = key
    return count

"""Short lists of a row's best tokens in Triton, and the alternatives that are told from them."""

# S rows · V vocabulary · X chunks · N tokens of a list · R rows of a launch · K alternatives

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.sampling.scan import key_of, load_frame, x_of
from headrace.ops.sampling.search import EVERY_ID, append, highest, is_left, listed, of_row

# What a list holds at most, and how many of the best tokens a row without top-k is given.
LIST = 4096
CANDIDATES = 1024

_BELOW_ALL = tl.constexpr(-(1 << 63))  # keys with ids


@triton.jit
def list_best(
    x_V,
    vocab,
    maxima_X,
    wanted,
    list_N,  # int32, room for two lists; the second is scratch
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,  # the power of two at or above X
    LIST: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Lists the best tokens of a row, by id: those that reach the `wanted`-th largest maximum of
    its chunks, which at least as many do.

    Returns: this bound, -inf if all tokens are listed; how many are, more than a list holds if
    there is no list.
    """
    chunks = tl.cdiv(vocab, CHUNK)
    chunk = tl.arange(0, CHUNKS)
    maxima = tl.load(maxima_X + chunk, mask=chunk < chunks, other=-float("inf"))
    bound = tl.max(maxima, axis=0) * 0 - float("inf")
    many = tl.where((wanted > chunks) & (vocab > LIST), LIST + 1, 0)
    if wanted <= chunks:
        lo = key_of(tl.min(maxima, axis=0))
        hi = key_of(tl.max(maxima, axis=0))
        one = tl.where(chunk < chunks, 1.0, 0.0)
        key = highest(maxima, one, 0.0, wanted.to(tl.float64), False, lo, hi, SHIFT)
        bound = x_of(key)
    if many == 0:
        chosen = ((maxima >= bound) & (maxima > -float("inf"))).to(tl.int32)
        many = tl.sum(chosen, axis=0)
        place = tl.cumsum(chosen, axis=0) - 1
        tl.store(list_N + LIST + place, chunk, mask=(chosen > 0) & (place < LIST))
    tl.debug_barrier()
    found = many
    if many <= LIST:
        found = _list_chunks(x_V, vocab, list_N, many, bound, CHUNK, LIST)
    tl.debug_barrier()
    return bound, found


@triton.jit
def _list_chunks(x_V, vocab, list_N, many, bound, CHUNK: tl.constexpr, LIST: tl.constexpr):
    """Lists the tokens of some chunks, named in the list behind, that reach a bound."""
    found = many * 0
    for first in range(0, many, LIST // CHUNK):
        at = first + tl.arange(0, LIST // CHUNK)
        chunk = tl.load(list_N + LIST + at, mask=at < many, other=0)
        token = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        x = of_row(x_V, vocab, tl.where((at < many)[:, None], token, vocab))
        chosen = (x >= bound) & (x > -float("inf"))
        found = append(list_N, found, token, chosen, LIST)
    return found


@triton.jit(do_not_specialize=["width"])
def alternatives_kernel(
    x_SV,
    row_stride,
    vocab,
    maxima_SX,
    maxima_stride,
    row_R,
    wanted_R,  # int64: alternatives, not counting what ties with the last one
    list_RN,  # int32: room for two lists a row
    frame_SF,  # see `store_frame`
    count_R,  # int64
    token_RK,  # int64
    logprob_RK,  # float32
    width,  # K
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LIST: tl.constexpr,
    SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best tokens of what is left of a row, best first and equal ones by id."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(row_R + at).to(tl.int64)
    wanted = tl.load(wanted_R + at).to(tl.int32)
    x_V = x_SV + row * row_stride
    list_N = list_RN + at * (2 * LIST)
    bound, found = list_best(
        x_V, vocab, maxima_SX + row * maxima_stride, wanted, list_N, CHUNK, CHUNKS, LIST, SHIFT
    )
    _, _, _, high, low, low_token = load_frame(frame_SF, row)
    n = tl.where(found <= LIST, found, 0)
    x, token = listed(x_V, list_N, n, LIST)
    # What was filtered away may be all that is listed.
    held = tl.sum(is_left(x, token, (high, low, low_token)).to(tl.int32), axis=0)
    holds = (found <= LIST) & ((held >= wanted) | (low >= bound))
    n = tl.where(holds, n, vocab)
    token_K = token_RK + at * width
    logprob_K = logprob_RK + at * width
    count = _tell_best(
        x_V, vocab, list_N, n, holds, frame_SF, row, wanted, token_K, logprob_K, width, LIST
    )
    tl.store(count_R + at, count.to(tl.int64))


@triton.jit
def _tell_best(
    x_V, vocab, list_N, n, holds, frame_SF, row, wanted, token_K, logprob_K, width,
    LIST: tl.constexpr,
):  # fmt: skip
    """Stores the best tokens one after the other, from a list or a whole row. Returns: how many."""
    best, inverse, log_mass, high, low, low_token = load_frame(frame_SF, row)
    i = tl.arange(0, LIST)
    count = n * 0
    last = n * 0
    going = n >= 0
    # A key with an id below it, the smallest id on top: an order without ties.
    before = n.to(tl.int64) * 0 - (_BELOW_ALL + 1)
    while going:
        tops = tl.full([LIST], _BELOW_ALL, tl.int64)
        for first in range(0, n, LIST):
            token = first + i
            if holds:
                token = tl.load(list_N + token, mask=token < n, other=vocab)
            x = of_row(x_V, vocab, token)
            order = (key_of(x).to(tl.int64) << 32) + (EVERY_ID - token)
            left = is_left(x, token, (high, low, low_token)) & (order < before)
            tops = tl.maximum(tops, tl.where(left, order, _BELOW_ALL))
        before = tl.max(tops, axis=0)
        key = (before >> 32).to(tl.int32)
        # What ties with the last one wanted is told too.
        going = (before > _BELOW_ALL) & (count < width) & ((count < wanted) | (key == last))
        if going:
            token = EVERY_ID - (before & 0x7FFFFFFF).to(tl.int32)
            x = tl.load(x_V + token).to(tl.float64)
            tl.store(token_K + count, token.to(tl.int64))
            tl.store(logprob_K + count, ((x - best) * inverse - log_mass).to(tl.float32))
            count += 1
        last = key
    return count

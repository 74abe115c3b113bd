"""Where the mass of a row's tokens, cumulated best first, reaches a target.

Top-k, top-p, typical-p and the draw itself all ask that. A search halves an interval of keys among
tokens that are kept in registers: those of a list, ordered by id. Where the answer is not among a
row's best tokens, passes over the whole row first quarter the interval until a list holds it.

What tokens weigh is a float32, and so are sums of it: always of the same numbers in the same order,
whatever the company, so that a row's token is the same bits; and a larger threshold never has more
mass.
"""

# V vocabulary · N tokens of a list

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from headrace.ops.sampling.scan import KEY_INF, key_of, x_of

EVERY_ID = tl.constexpr(0x7FFFFFFF)

# Tokens that a thread loads at a time in a pass over the row.
_WIDTH = tl.constexpr(8)

# A float32 weight is zero further below the best token, in nats.
_DEPTH_MAX = tl.constexpr(88.0)


@triton.jit
def is_left(x, token, left):
    """Whether filters left a token (see `store_frame`); they never leave a logit of -inf."""
    high, low, low_token = left
    return (x <= high) & ((x > low) | ((x == low) & (token <= low_token)))


@triton.jit
def place_and_weigh(x, token, left, order, warp):
    """Where tokens stand in the order of a search, -inf if they are not left; and their weights.

    Args:
        order: whether near ones come first instead of large ones, and near to what.
        warp: the best logit, and what distances to it are multiplied with: 0 counts tokens.
    """
    near, centre = order
    best, scale = warp
    stays = is_left(x, token, left)
    y = tl.where(near, -tl.abs(x - centre), x)
    y = tl.where(stays, y, -float("inf"))
    return y, tl.where(stays, tl.exp2((x - best) * scale), 0.0)


@triton.jit
def reaches(sum_, target, strict):
    """Whether a sum reaches the target; exceeds it, where `strict`."""
    return (sum_ > target) | ((sum_ == target) & (strict == 0))


@triton.jit
def highest(y, weight, above, target, strict, lo, hi, shift):
    """The largest key in lo..hi at which `above` and the weights from there on reach the target.

    Args:
        shift: how many low bits of the keys are zero.

    Returns: `lo` if none does.
    """
    lo = lo >> shift
    hi = hi >> shift
    while lo < hi:
        middle = (lo | hi) - ((lo ^ hi) >> 1)
        bound = x_of(middle << shift)
        sum_ = above + tl.sum(tl.where(y >= bound, weight, 0.0), axis=0).to(tl.float64)
        reached = reaches(sum_, target, strict)
        lo = tl.where(reached, middle, lo)
        hi = tl.where(reached, hi, middle - 1)
    return lo << shift


@triton.jit
def listed(x_V, list_N, n, LIST: tl.constexpr):
    """Logits and ids of a list's tokens; -inf beyond its end."""
    at = tl.arange(0, LIST)
    token = tl.load(list_N + at, mask=at < n, other=0)
    return tl.load(x_V + token, mask=at < n, other=-float("inf")).to(tl.float32), token


@triton.jit
def of_row(x_V, vocab, token):
    """Logits of a row; -inf beyond its end."""
    return tl.load(x_V + token, mask=token < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def measure(x_V, vocab, list_N, n, holds, left, centre, within, warp, LIST: tl.constexpr):
    """Sums over the tokens that are left and at most so far from a logit.

    Args:
        holds: whether the list holds all of them.

    Returns: their mass; Σ weight · log2 of 1 / weight; the largest and the smallest logit.
    """
    count = tl.where(holds, n, vocab)
    i = tl.arange(0, LIST // _WIDTH)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    mass = tl.zeros([LIST // _WIDTH], tl.float32)
    surprise = mass
    largest = mass - float("inf")
    smallest = mass + float("inf")
    for first in range(0, count, LIST):
        token = first + i
        if holds:
            token = tl.load(list_N + token, mask=token < n, other=vocab)
        x = of_row(x_V, vocab, token)
        counts = is_left(x, token, left) & (tl.abs(x - centre) <= within)
        power = (x - warp[0]) * warp[1]
        weight = tl.where(counts, tl.exp2(power), 0.0)
        mass += tl.sum(weight, axis=1)
        surprise += tl.sum(tl.where(weight > 0, weight * -power, 0.0), axis=1)
        largest = tl.maximum(largest, tl.max(tl.where(counts, x, -float("inf")), axis=1))
        smallest = tl.minimum(smallest, tl.min(tl.where(counts, x, float("inf")), axis=1))
    return (
        tl.sum(mass, axis=0).to(tl.float64),
        tl.sum(surprise, axis=0).to(tl.float64),
        tl.max(largest, axis=0),
        tl.min(smallest, axis=0),
    )


@triton.jit
def _row_sums(x_V, vocab, left, order, warp, at_0, at_1, at_2, at_3, LIST: tl.constexpr):
    """How many tokens stand at each of four places or before, and what those weigh."""
    i = tl.arange(0, LIST // _WIDTH)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    count_0 = tl.zeros([LIST // _WIDTH], tl.int32)
    count_1 = count_0
    count_2 = count_0
    count_3 = count_0
    mass_1 = tl.zeros([LIST // _WIDTH], tl.float32)
    mass_2 = mass_1
    mass_3 = mass_1
    for first in range(0, vocab, LIST):
        token = first + i
        y, weight = place_and_weigh(of_row(x_V, vocab, token), token, left, order, warp)
        count_0 += tl.sum((y >= at_0).to(tl.int32), axis=1)
        count_1 += tl.sum((y >= at_1).to(tl.int32), axis=1)
        count_2 += tl.sum((y >= at_2).to(tl.int32), axis=1)
        count_3 += tl.sum((y >= at_3).to(tl.int32), axis=1)
        mass_1 += tl.sum(tl.where(y >= at_1, weight, 0.0), axis=1)
        mass_2 += tl.sum(tl.where(y >= at_2, weight, 0.0), axis=1)
        mass_3 += tl.sum(tl.where(y >= at_3, weight, 0.0), axis=1)
    return (
        tl.sum(count_0, axis=0),
        tl.sum(count_1, axis=0),
        tl.sum(count_2, axis=0),
        tl.sum(count_3, axis=0),
        tl.sum(mass_1, axis=0).to(tl.float64),
        tl.sum(mass_2, axis=0).to(tl.float64),
        tl.sum(mass_3, axis=0).to(tl.float64),
    )


@triton.jit
def _quarters(lo, hi, evenly, shift):
    """Three keys that part the interval of two others: its middle, and two by the numbers' size.

    Numbers divide mass well, keys end soon wherever the answer is.

    Args:
        evenly: whether all are by keys.
    """
    width = hi.to(tl.int64) - lo
    low = x_of(lo << shift).to(tl.float64)
    far = x_of(hi << shift).to(tl.float64) - low
    first = key_of((low + far * 0.25).to(tl.float32)) >> shift
    third = key_of((low + far * 0.75).to(tl.float32)) >> shift
    first = tl.where(evenly, (lo + (width >> 2)).to(tl.int32), first)
    third = tl.where(evenly, (lo + ((width * 3) >> 2)).to(tl.int32), third)
    middle = (lo | hi) - ((lo ^ hi) >> 1)
    first = tl.minimum(tl.maximum(first, lo + 1), hi)
    third = tl.minimum(tl.maximum(third, first), hi)
    second = tl.minimum(tl.maximum(middle, first), third)
    return tl.minimum(first, middle), second, tl.maximum(third, middle)


@triton.jit
def narrow(
    x_V, vocab, left, order, warp, target, strict, lo, hi, above, before, shift, LIST: tl.constexpr
):
    """Quarters an interval of keys by passes over the row, until a list holds what is in it.

    Args:
        lo, hi: keys; the answer is one of these or one between.
        above: what weighs the tokens that stand before `hi`, float64.
        before: how many these are.

    Returns: `lo`, `hi` and `above`; how many tokens are in the interval, which are more than a
    list holds only if they all have one key, and none only if none is left from the first `lo` on.
    """
    lo = tl.maximum(lo >> shift, (-KEY_INF >> shift) + 1)  # what is not left stands at -inf
    hi = tl.maximum(hi >> shift, lo)
    n = vocab
    evenly = warp[1] == 0
    going = vocab > 0
    while going:
        key_1, key_2, key_3 = _quarters(lo, hi, evenly, shift)
        count_0, count_1, count_2, count_3, mass_1, mass_2, mass_3 = _row_sums(
            x_V, vocab, left, order, warp, x_of(lo << shift), x_of(key_1 << shift),
            x_of(key_2 << shift), x_of(key_3 << shift), LIST,
        )  # fmt: skip
        # Rounding may leave a target out of reach: it is reached where nothing follows.
        is_1 = reaches(mass_1, target, strict) | (count_1 == count_0)
        is_2 = reaches(mass_2, target, strict) | (count_2 == count_0)
        is_3 = reaches(mass_3, target, strict) | (count_3 == count_0)
        above = tl.where(is_3, above, tl.where(is_2, mass_3, tl.where(is_1, mass_2, mass_1)))
        before = tl.where(is_3, before, tl.where(is_2, count_3, tl.where(is_1, count_2, count_1)))
        end = tl.where(is_2, key_3, tl.where(is_1, key_2, key_1))
        hi = tl.where(is_3, hi, tl.maximum(end - 1, lo))
        lo = tl.where(is_3, key_3, tl.where(is_2, key_2, tl.where(is_1, key_1, lo)))
        count = tl.where(is_3, count_3, tl.where(is_2, count_2, tl.where(is_1, count_1, count_0)))
        n = count - before
        going = (n > LIST) & (lo < hi)
    return lo << shift, hi << shift, above, n


@triton.jit
def list_between(x_V, vocab, list_N, left, order, warp, lo, hi, LIST: tl.constexpr):
    """Lists the tokens that stand between two keys, by id."""
    i = tl.arange(0, LIST // _WIDTH)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
    found = vocab * 0
    tl.debug_barrier()  # The list may still be read as something else.
    for first in range(0, vocab, LIST):
        token = first + i
        y, _ = place_and_weigh(of_row(x_V, vocab, token), token, left, order, warp)
        found = append(list_N, found, token, (y >= x_of(lo)) & (y <= x_of(hi)), LIST)
    tl.debug_barrier()


@triton.jit
def append(list_N, found, token_IJ, chosen_IJ, LIST: tl.constexpr):
    """Appends the chosen tokens to a list, row by row, as far as it has room.

    Returns: how many would be listed then.
    """
    chosen_IJ = chosen_IJ.to(tl.int32)
    count_I = tl.sum(chosen_IJ, axis=1)
    before_I = found + tl.cumsum(count_I, axis=0) - count_I
    place_IJ = before_I[:, None] + tl.cumsum(chosen_IJ, axis=1) - 1
    tl.store(list_N + place_IJ, token_IJ, mask=(chosen_IJ > 0) & (place_IJ < LIST))
    return found + tl.sum(count_I, axis=0)


@triton.jit
def nth_of_list(y, token, place, rank):
    """The id of a rank among those that stand at a place; ids ascend."""
    ties = y == place
    number = tl.cumsum(ties.to(tl.int32), axis=0) - 1
    return tl.min(tl.where(ties & (number == rank), token, EVERY_ID), axis=0)


@triton.jit
def nth_of_row(x_V, vocab, x, rank, LIST: tl.constexpr):
    """The id of a rank among a row's tokens with a logit."""
    i = tl.arange(0, LIST)
    before = vocab * 0
    start = vocab * 0
    skipped = vocab * 0
    for first in range(0, vocab, LIST):
        count = tl.sum((of_row(x_V, vocab, first + i) == x).to(tl.int32), axis=0)
        here = (before <= rank) & (rank < before + count)
        start = tl.where(here, first, start)
        skipped = tl.where(here, before, skipped)
        before += count
    return nth_of_list(of_row(x_V, vocab, start + i), start + i, x, rank - skipped)


@triton.jit
def lowest(vocab, left, order, warp, inverse, mass, target):
    """A key that the answer of a search does not lie below.

    Args:
        mass: of all tokens that are left.
    """
    near, centre = order
    best = warp[0].to(tl.float64)
    # Tokens so far below the best one weigh less than what lies beyond the target, all together.
    beyond = tl.maximum(mass - target, 1e-35)
    depth = tl.minimum(tl.log(vocab.to(tl.float64) / beyond) + 0.01, _DEPTH_MAX) / inverse
    x = (best - depth).to(tl.float32)
    distance = tl.maximum(tl.abs(warp[0] - centre), tl.abs(centre - x))
    y = tl.where(near, -distance, tl.maximum(x, left[1]))
    return tl.where(warp[1] == 0, -KEY_INF, key_of(y))

"""Searches among the tokens of a row for a threshold that enough of them, or enough mass, reach.

Tokens are those of a list, or of a whole row; filters before have left an interval of them: see
`store_frame`. A key's bits are found from the highest on, a pass over the tokens for each. That is
exact, needs no sort, and takes the same steps whatever the logits are.

What tokens weigh is computed in float32 and summed exactly: rounded to multiples of a power of two
so coarse that float64 holds every sum of them. So neither the order of a list nor the shape of a
reduction matters, and a larger threshold never has more mass.
"""

# N tokens searched

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

from headrace.ops.sampling.scan import KEY_INF, key_of

SIGN = tl.constexpr(-0x80000000)  # below all keys
ABOVE_ALL = tl.constexpr(0x7FFFFFFF)  # keys and ids

VOCAB_MAX = tl.constexpr(1 << 20)

# What `fold` sums over the tokens that are left.
COUNT = tl.constexpr(0)  # how many have a key of at least `bound`
MASS = tl.constexpr(2)  # what tokens with a key of at least `bound` weigh
NEAR = tl.constexpr(3)  # what those weigh whose `nearness` is at least `bound`
ENTROPY = tl.constexpr(4)  # Σ weight · log2 of 1 / weight
TIES = tl.constexpr(1)  # how many have the key `bound` and an id below `below`


@triton.jit
def highest(
    x_N,
    token_N,
    n,
    best,
    scale,
    centre,
    high,
    low,
    low_token,
    target,
    STRICT: tl.constexpr,
    WHAT: tl.constexpr,
    LIST: tl.constexpr,
    SHIFT: tl.constexpr,
    LISTED: tl.constexpr,
):
    """The largest bound at which `fold` reaches `target`; the smallest int32 if none does.

    Args:
        SHIFT: how many low bits of the keys are zero.
    """
    bits = n * 0
    bit = bits + SIGN
    for _ in range(32 - SHIFT):
        sum_ = fold(
            x_N, token_N, n, best, scale, centre, high, low, low_token, (bits | bit) ^ SIGN, 0,
            WHAT, LIST, LISTED,
        )  # fmt: skip
        reached = sum_ > target if STRICT else sum_ >= target
        bits = tl.where(reached, bits | bit, bits)
        bit = (bit >> 1) & 0x7FFFFFFF
    return bits ^ SIGN


@triton.jit
def nth(
    x_N, token_N, n, key, rank, TOKEN_BITS: tl.constexpr, LIST: tl.constexpr, LISTED: tl.constexpr
):
    """The token of a rank, by id, among those with a key: the largest id that `rank` lie below."""
    token = n * 0
    bit = token + (1 << (TOKEN_BITS - 1))
    for _ in range(TOKEN_BITS):
        below = fold(
            x_N, token_N, n, 0.0, 0.0, 0.0, KEY_INF, -KEY_INF, -1, key, token | bit,
            TIES, LIST, LISTED,
        )  # fmt: skip
        token = tl.where(below <= rank, token | bit, token)
        bit = bit >> 1
    return token


@triton.jit
def fold(
    x_N,
    token_N,
    n,
    best,
    scale,
    centre,
    high,
    low,
    low_token,
    bound,
    below,
    WHAT: tl.constexpr,
    LIST: tl.constexpr,
    LISTED: tl.constexpr,
):
    """A sum over the tokens that are left; float64."""
    # More loads under way at a time where there are many.
    TILE: tl.constexpr = LIST if LISTED else 4 * LIST
    i = tl.arange(0, TILE)
    sums = tl.zeros([TILE], tl.float32)
    for first in range(0, n, TILE):
        x, token, key = tile(x_N, token_N, n, first + i, LISTED)
        left = is_left(key, token, high, low, low_token)
        if WHAT == TIES:
            left &= (key == bound) & (token < below)
        elif WHAT == NEAR:
            left &= nearness(x, centre) >= bound
        else:
            left &= key >= bound
        if WHAT <= TIES:
            sums += left.to(tl.float32)
        else:
            power = (x - best) * scale
            weight = tl.exp2(power)
            if WHAT == ENTROPY:
                weight *= -power
            sums += tl.where(left, weight, 0.0)
    if WHAT <= TIES:
        return tl.sum(sums.to(tl.int32), axis=0).to(tl.float64)
    return tl.sum(exact(sums.to(tl.float64), LIST if LISTED else VOCAB_MAX), axis=0)


@triton.jit
def ends(
    x_N, token_N, n, centre, high, low, low_token, near, floor,
    LIST: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """The largest and the smallest logit of those left that are at least so near."""
    i = tl.arange(0, LIST)
    largest = tl.full([LIST], -float("inf"), tl.float32)
    smallest = tl.full([LIST], float("inf"), tl.float32)
    for first in range(0, n, LIST):
        x, token, key = tile(x_N, token_N, n, first + i, LISTED)
        left = is_left(key, token, high, low, low_token) & (nearness(x, centre) >= near)
        largest = tl.maximum(largest, tl.where(left, x, -float("inf")))
        smallest = tl.minimum(smallest, tl.where(left, x, float("inf")))
    return tl.max(largest, axis=0), tl.min(smallest, axis=0)


@triton.jit
def tile(x_N, token_N, n, at, LISTED: tl.constexpr):
    """Logits, ids and keys of a tile; -inf beyond the end."""
    x = tl.load(x_N + at, mask=at < n, other=-float("inf")).to(tl.float32)
    token = tl.load(token_N + at, mask=at < n, other=0) if LISTED else at
    return x, token, key_of(x)


@triton.jit
def is_left(key, token, high, low, low_token):
    """Whether filters left a token; they never leave a logit of -inf."""
    return (key <= high) & ((key > low) | ((key == low) & (token <= low_token)))


@triton.jit
def nearness(x, centre):
    """The larger, the nearer a logit is to the expected one; an int32 of at most 0."""
    return -(tl.abs(x - centre).to(tl.int32, bitcast=True))


@triton.jit
def exact(x, BOUND: tl.constexpr):
    """Rounds float64 so that all sums up to BOUND, a power of two, are exact."""
    return (x + BOUND) - BOUND

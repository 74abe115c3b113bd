"""Watermarks: which tokens a text favours after each of its tokens, and how to tell that it did.

After Kirchenbauer et al., "A Watermark for Large Language Models" (2023): the last token divides
the vocabulary into green tokens and others, and `delta` is added to the logits of the green ones,
before anything else is done with them. Who knows which tokens are green counts them (`z_score`).

What is green is a function of two token ids and of `gamma` alone, so every device finds the same,
whoever shares the batch. All arithmetic is that of unsigned 32-bit integers, which wrap around:

    mix(x):  x ^= x >> 16;  x *= 0x85EBCA6B;  x ^= x >> 13;  x *= 0xC2B2AE35;  x ^= x >> 16
    seed  =  mix(15485863 * previous)
    hash  =  mix(seed + 0x9E3779B9 * (token + 1)) >> 1
    `token` is green after `previous` where hash < floor(gamma * 2^31)

`gamma` is thereby the probability that a token is green, and about that share of a vocabulary is.
`is_green` is this definition, `green_tokens` computes it for whole vocabularies in PyTorch, and
`draw.py` in Triton.
"""

# R rows with a watermark · V vocabulary

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Of the last token's id, so that neighbours' seeds lie far apart; TGI's key.
HASH_KEY = 15485863
# From a token's hash input to the next one's.
STEP = 0x9E3779B9
# Of the finalizer of MurmurHash3.
MIX_1 = 0x85EBCA6B
MIX_2 = 0xC2B2AE35

_MODULUS = 1 << 32


@dataclass(frozen=True)
class Watermark:
    """What all watermarks of a server are made of; the defaults are TGI's."""

    gamma: float = 0.5  # the probability that a token is green; between 0 and 1
    delta: float = 2.0  # what green tokens' logits are raised by

    @property
    def threshold(self) -> int:
        """The hashes of 31 bits below it are green tokens'."""
        return int(self.gamma * (1 << 31))


def is_green(previous: int, token: int, gamma: float) -> bool:
    """Whether a token is green after another one."""
    seed = _mix(HASH_KEY * previous % _MODULUS)
    found = _mix((seed + STEP * (token + 1)) % _MODULUS)
    return found >> 1 < Watermark(gamma).threshold


def green_tokens(previous_R: Tensor, vocab: int, gamma: float) -> Tensor:
    """Which tokens are green after each of some tokens (int64): bool, [R, V]."""
    token_V = torch.arange(1, vocab + 1, device=previous_R.device)
    # To 32 bits by dropping those above; sums and products of int32 wrap around.
    seed_R = _mix_bits((previous_R * HASH_KEY).int())
    found_RV = _mix_bits(seed_R[:, None] + (token_V * STEP).int())
    return _shifted(found_RV, 1) < Watermark(gamma).threshold


def z_score(tokens: Iterable[int], gamma: float) -> float:
    """How many standard deviations more tokens of a text are green than chance makes.

    Texts without one have 0 on average, and one in 30,000 of them has more than 4. Equal pairs of
    neighbours count once, or a text that repeats itself would be taken for a marked one.

    Args:
        tokens: ids of the text, by the tokenizer of the model that may have written it; the last
            token of the prompt before them, where it is known, adds a pair.
        gamma: the server's.

    Returns: 0 for a text without pairs.
    """
    pairs = set(pairwise(tokens))
    if not pairs:
        return 0.0
    green = sum(is_green(previous, token, gamma) for previous, token in pairs)
    return (green - gamma * len(pairs)) / math.sqrt(len(pairs) * gamma * (1 - gamma))


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * MIX_1 % _MODULUS
    x ^= x >> 13
    x = x * MIX_2 % _MODULUS
    return x ^ x >> 16


def _mix_bits(x: Tensor) -> Tensor:
    """`_mix` of int32, whose bits are taken as an unsigned number's."""
    x = (x ^ _shifted(x, 16)) * (MIX_1 - _MODULUS)
    x = (x ^ _shifted(x, 13)) * (MIX_2 - _MODULUS)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Bits of int32 moved down, zeros behind them."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)

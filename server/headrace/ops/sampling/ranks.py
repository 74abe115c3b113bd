"""Tokens of rows whose vocabulary is divided over ranks: no rank sees another's logits.

Each rank brings its own columns of a row together and posts a few words to all ranks: its best
logit, the mass of its tokens beside that, and which token it is. So all of them find the same best
token with the same probability, to the bit, and nobody has to be told.

Where a row draws from its whole vocabulary, all ranks find from these words which of them has the
place of the draw, and that one posts the token that it finds there.
"""

# The types of Triton's language are not those that its kernels are called with.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

# S rows · C this rank's columns of the vocabulary · Z slots

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.device.peers import Share
from headrace.ops.mailbox import Mailbox, boxes_of, post, receive
from headrace.ops.sampling.base import Samples, empty_samples
from headrace.ops.sampling.draw import LAST_SHARE, exact, token_at
from headrace.ops.sampling.scan import LOG2_E, inverse_of, pieces_of
from headrace.ops.sampling.triton import TritonSampling
from headrace.ops.triton import Gpu

# Rows of a step that the mailbox has room for.
ROWS_MAX = 1024
# Words of a message: best logit, token, and mass (of a draw in two words); then, of a draw, what
# was drawn: its logit and token.
MESSAGE = 4
# Of the table of sampling parameters that a step's columns are taken from.
KNOB_STRIDE = 8


@triton.jit
def _word(bits_W, word, index: tl.constexpr):
    return tl.sum(tl.where(word == index, bits_W, 0), 0)


@triton.jit(
    do_not_specialize=["rank", "first", "vocab", "pieces"],
    do_not_specialize_on_alignment=["slot_S", "token_S", "logprob_S", "bad_S"],
)
def best_of_ranks_kernel(
    best_SC,
    mass_SC,
    where_SC,
    slot_S,
    last_token_Z,
    token_S,
    logprob_S,
    bad_S,
    first,  # this rank's first token
    vocab,  # of all ranks
    pieces,
    box,
    address_R,
    sent,
    rank,
    PIECES: tl.constexpr,  # the power of two at or above `pieces`
    MESSAGE: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    boxes = boxes_of(address_R, RANKS)
    if PDL:
        gdc_wait()
    number = tl.load(sent + row) + 1
    maxima, _, best, mass, _ = pieces_of(best_SC, mass_SC, row, pieces, 1.0, PIECES)
    piece = tl.arange(0, PIECES)
    where = tl.load(where_SC + row * pieces + piece, mask=piece < pieces, other=vocab)
    token = first + tl.min(tl.where(maxima == best, where, vocab), axis=0)

    word = tl.arange(0, MESSAGE)
    bits_W = tl.where(word == 0, best.to(tl.float32).to(tl.int32, bitcast=True), token)
    mass_bits = mass.to(tl.float32).to(tl.int32, bitcast=True)
    bits_W = tl.where(word == 2, mass_bits, bits_W)
    post(boxes, rank, row, number, bits_W, word, word < WORDS, RANKS, ROWS, WORDS)
    tl.debug_barrier()
    tl.store(sent + row, number)

    top = -float("inf")
    top_token = vocab
    total = 0.0
    for peer in tl.static_range(RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        told_W = receive(box, peer, row, number, word, word < WORDS, RANKS, ROWS, WORDS)
        its_best = _word(told_W, word, 0).to(tl.float32, bitcast=True)
        its_mass = _word(told_W, word, 2).to(tl.float32, bitcast=True)
        # Ranks are in the order of their tokens: the first of equals is the lowest.
        is_better = its_best > top
        new_top = tl.where(is_better, its_best, top)
        beside = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - beside) + its_mass * tl.exp(its_best - beside)
        top_token = tl.where(is_better, _word(told_W, word, 1), top_token)
        top = new_top
    bad = (total >= 0.5) == 0  # pyright: ignore[reportOperatorIssue]
    token = tl.minimum(top_token, vocab - 1).to(tl.int64)  # A row of NaN has no best token.
    tl.store(token_S + row, token)
    tl.store(logprob_S + row, tl.where(bad, 0.0, 0.0 - tl.log(total)).to(tl.float32))
    tl.store(bad_S + row, bad)
    tl.store(last_token_Z + tl.load(slot_S + row), token)


@triton.jit
def _halves(x):
    """The words of a float64."""
    bits = x.to(tl.int64, bitcast=True)
    return bits.to(tl.int32), (bits >> 32).to(tl.int32)


@triton.jit
def _whole(low, high):
    """The float64 of two words."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _mass_told(
    box, peer, row, number, word, beside, inverse,
    RANKS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """What a rank's tokens weigh beside a logit, by the words that it has posted."""
    told_W = receive(box, peer, row, number, word, word < WORDS, RANKS, ROWS, WORDS)
    its_best = _word(told_W, word, 0).to(tl.float32, bitcast=True)
    its_mass = _whole(_word(told_W, word, 2), _word(told_W, word, 3))
    return its_mass * tl.exp((its_best - beside) * inverse).to(tl.float64)


@triton.jit(
    do_not_specialize=["rank", "first", "vocab", "pieces", "knob_stride"],
    do_not_specialize_on_alignment=["slot_S", "token_S", "logprob_S", "bad_S"],
)
def draw_of_ranks_kernel(  # noqa: PLR0915
    x_SC,
    row_stride,
    columns,
    best_SC,
    mass_SC,
    where_SC,
    temperature_S,
    knob_stride,
    uniform_S,
    slot_S,
    last_token_Z,
    token_S,
    logprob_S,
    bad_S,
    first,  # this rank's first token
    vocab,  # of all ranks
    pieces,
    box,
    address_R,
    sent,
    rank,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    MESSAGE: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Draws from a row's whole vocabulary, in the order of ids; at temperature 0 the best token."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    boxes = boxes_of(address_R, RANKS)
    if PDL:
        gdc_wait()
    number = tl.load(sent + row) + 1
    temperature = tl.load(temperature_S + row * knob_stride)
    inverse = inverse_of(temperature)
    maxima, masses, best, _, _ = pieces_of(best_SC, mass_SC, row, pieces, inverse, PIECES)
    piece = tl.arange(0, PIECES)
    where = tl.load(where_SC + row * pieces + piece, mask=piece < pieces, other=vocab)
    best_token = first + tl.min(tl.where(maxima == best, where, vocab), axis=0)
    masses = exact(masses, PIECES * PIECE)
    mass = tl.sum(masses, axis=0)

    word = tl.arange(0, MESSAGE)
    low, high = _halves(mass)
    bits_W = tl.where(word == 0, best.to(tl.float32).to(tl.int32, bitcast=True), best_token)
    bits_W = tl.where(word == 2, low, tl.where(word == 3, high, bits_W))
    post(boxes, rank, row, number, bits_W, word, word < WORDS, RANKS, ROWS, WORDS)
    tl.debug_barrier()
    tl.store(sent + row, number + 1)  # A draw is two messages.

    # From what all have told all ranks compute the same, in the same order.
    top = -float("inf")
    top_token = vocab
    for peer in tl.static_range(RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        told_W = receive(box, peer, row, number, word, word < WORDS, RANKS, ROWS, WORDS)
        its_best = _word(told_W, word, 0).to(tl.float32, bitcast=True)
        is_better = its_best > top
        top_token = tl.where(is_better, _word(told_W, word, 1), top_token)
        top = tl.where(is_better, its_best, top)
    beside = tl.where(top == -float("inf"), 0.0, top)
    uniform = tl.load(uniform_S + row)
    total = uniform * 0
    for peer in tl.static_range(RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        total += _mass_told(box, peer, row, number, word, beside, inverse, RANKS, ROWS, WORDS)
    target = tl.minimum(uniform * total, total * LAST_SHARE)
    chosen = rank * 0
    before = uniform * 0
    own = uniform * 0
    reached = uniform * 0
    for peer in tl.static_range(RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        its = _mass_told(box, peer, row, number, word, beside, inverse, RANKS, ROWS, WORDS)
        has_place = (target >= reached) & (target < reached + its)
        chosen = tl.where(has_place, peer, chosen)
        before = tl.where(has_place, reached, before)
        own = tl.where(has_place, its, own)
        reached += its

    # Every rank looks among its own tokens, and the one that has the place is believed.
    inner = tl.minimum((target - before) / own * mass, mass * LAST_SHARE)
    x_C = x_SC + row * row_stride
    floor = inverse * 0 - float("inf")
    token = token_at(
        x_C, columns, maxima, masses, pieces, inner, floor, inverse * LOG2_E, PIECES, PIECE
    )
    token = tl.maximum(token, 0)
    x = tl.load(x_C + token).to(tl.float32)
    bits_W = tl.where(word == 0, x.to(tl.int32, bitcast=True), first + token)
    # All threads have read the first message before the second lets others post a third.
    tl.debug_barrier()
    post(boxes, rank, row, number + 1, bits_W, word, word < WORDS, RANKS, ROWS, WORDS)
    drawn = top_token
    drawn_x = beside
    for peer in tl.static_range(RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        told_W = receive(box, peer, row, number + 1, word, word < WORDS, RANKS, ROWS, WORDS)
        is_drawn = (temperature > 0) & (chosen == peer)
        drawn = tl.where(is_drawn, _word(told_W, word, 1), drawn)
        drawn_x = tl.where(is_drawn, _word(told_W, word, 0).to(tl.float32, bitcast=True), drawn_x)
    bad = (total >= 0.5) == 0  # pyright: ignore[reportOperatorIssue]
    drawn = tl.minimum(tl.where(bad, 0, drawn), vocab - 1).to(tl.int64)
    logprob = ((drawn_x - beside) * inverse).to(tl.float64) - tl.log(total)
    tl.store(token_S + row, drawn)
    tl.store(logprob_S + row, tl.where(bad, 0.0, logprob).to(tl.float32))
    tl.store(bad_S + row, bad)
    tl.store(last_token_Z + tl.load(slot_S + row), drawn)


class SamplingOfRanks:
    """See `SharedSampling`: two launches each, of which those of `accept` can be captured."""

    def __init__(
        self, sampling: TritonSampling, gpu: Gpu, box: Mailbox, first: int, columns: int, vocab: int
    ) -> None:
        """
        Args:
            first: this rank's first token.
            columns: how many tokens are this rank's, padding left out; at least one.
            vocab: how many there are on all ranks.
        """
        self._sampling = sampling
        self._gpu = gpu
        self._box = box
        self._first, self._columns, self._vocab = first, columns, vocab
        self.rows_max = box.rows

    def accept(self, logits_SC: Tensor, slot_S: Tensor, last_token_Z: Tensor, out: Samples) -> None:
        assert logits_SC.shape[0] <= self.rows_max
        scan = self._sampling.scan(logits_SC[:, : self._columns])
        self._gpu.run(
            best_of_ranks_kernel,
            (logits_SC.shape[0],),
            *(scan.best_SC, scan.mass_SC, scan.where_SC, slot_S, last_token_Z),
            *(out.token_S, out.logprob_S, out.bad_S),
            *(self._first, self._vocab, scan.pieces),
            *self._box.arguments,
            PIECES=triton.next_power_of_2(scan.pieces),
            MESSAGE=MESSAGE,
            **self._box.constants,
            warps=1,
        )

    def draw(
        self,
        logits_SC: Tensor,
        temperature_S: Tensor,
        uniform_S: Tensor,
        slot_S: Tensor,
        last_token_Z: Tensor,
        out: Samples,
    ) -> None:
        assert logits_SC.shape[0] <= self.rows_max
        x_SC = logits_SC[:, : self._columns]
        scan = self._sampling.scan(x_SC, temperature_S=temperature_S)
        self._gpu.run(
            draw_of_ranks_kernel,
            (logits_SC.shape[0],),
            *(x_SC, x_SC.stride(0), self._columns),
            *(scan.best_SC, scan.mass_SC, scan.where_SC),
            *(temperature_S, temperature_S.stride(0), uniform_S, slot_S, last_token_Z),
            *(out.token_S, out.logprob_S, out.bad_S),
            *(self._first, self._vocab, scan.pieces),
            *self._box.arguments,
            PIECES=triton.next_power_of_2(scan.pieces),
            PIECE=self._sampling.piece,
            MESSAGE=MESSAGE,
            **self._box.constants,
            warps=8,
        )

    def prepare(self, dtype: torch.dtype, columns: int, where: torch.device) -> None:
        logits_SC = torch.zeros((1, columns), dtype=dtype, device=where)
        slot_S, last_token_Z = (torch.zeros(1, dtype=torch.int64, device=where) for _ in range(2))
        uniform_S = torch.zeros(1, dtype=torch.float64, device=where)
        temperature_S = torch.ones((1, KNOB_STRIDE), device=where)[:, 0]
        out = empty_samples(logits_SC)
        self.accept(logits_SC, slot_S, last_token_Z, out)
        self.draw(logits_SC, temperature_S, uniform_S, slot_S, last_token_Z, out)


def make(
    sampling: TritonSampling, gpu: Gpu, share: Share, ranks: int, vocab: int, columns: int
) -> SamplingOfRanks | None:
    """Makes it on all ranks; None where they share no memory, or where one has no tokens.

    Args:
        vocab: how many tokens there are.
        columns: of a rank, padding included.
    """
    if columns * (ranks - 1) >= vocab:
        return None
    box = Mailbox.make(share, ranks, ROWS_MAX, MESSAGE)
    if box is None:
        return None
    first = box.peers.rank * columns
    return SamplingOfRanks(sampling, gpu, box, first, min(columns, vocab - first), vocab)

"""The best token of rows whose vocabulary is divided over ranks: no rank sees another's logits.

Each rank brings its own columns of a row together and posts three words to all ranks: its best
logit, the mass of its tokens beside that, and which token it is. So all of them find the same token
with the same probability, to the bit, and nobody has to be told.
"""

# The types of Triton's language are not those that its kernels are called with.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

# S rows · C this rank's columns of the vocabulary · Z slots

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.device.peers import Share
from headrace.ops.mailbox import Mailbox, post, receive
from headrace.ops.sampling.base import Samples
from headrace.ops.sampling.scan import pieces_of
from headrace.ops.triton import Gpu

if TYPE_CHECKING:
    from headrace.ops.sampling.triton import TritonSampling

# Rows of a step that the mailbox has room for.
ROWS_MAX = 1024
# Words of a message: best logit, mass, token, and one that evens the number.
MESSAGE = 4


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
        gdc_wait()
    number = tl.load(sent + row) + 1
    maxima, _, best, mass, _ = pieces_of(best_SC, mass_SC, row, pieces, 1.0, PIECES)
    piece = tl.arange(0, PIECES)
    where = tl.load(where_SC + row * pieces + piece, mask=piece < pieces, other=vocab)
    token = first + tl.min(tl.where(maxima == best, where, vocab), axis=0)

    word = tl.arange(0, MESSAGE)
    bits_W = tl.where(word == 0, best.to(tl.float32).to(tl.int32, bitcast=True), token)
    mass_bits = mass.to(tl.float32).to(tl.int32, bitcast=True)
    bits_W = tl.where(word == 1, mass_bits, bits_W)
    post(address_R, rank, row, number, bits_W, word, word < WORDS, RANKS, ROWS, WORDS)
    tl.debug_barrier()
    tl.store(sent + row, number)

    top = -float("inf")
    top_token = vocab
    total = 0.0
    for peer in tl.static_range(RANKS):  # pyright: ignore[reportGeneralTypeIssues]
        told_W = receive(box, peer, row, number, word, word < WORDS, RANKS, ROWS, WORDS)
        its_best = _word(told_W, word, 0).to(tl.float32, bitcast=True)
        its_mass = _word(told_W, word, 1).to(tl.float32, bitcast=True)
        # Ranks are in the order of their tokens: the first of equals is the lowest.
        is_better = its_best > top
        new_top = tl.where(is_better, its_best, top)
        beside = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - beside) + its_mass * tl.exp(its_best - beside)
        top_token = tl.where(is_better, _word(told_W, word, 2), top_token)
        top = new_top
    bad = (total >= 0.5) == 0  # pyright: ignore[reportOperatorIssue]
    token = tl.minimum(top_token, vocab - 1).to(tl.int64)  # A row of NaN has no best token.
    tl.store(token_S + row, token)
    tl.store(logprob_S + row, tl.where(bad, 0.0, 0.0 - tl.log(total)).to(tl.float32))
    tl.store(bad_S + row, bad)
    tl.store(last_token_Z + tl.load(slot_S + row), token)


class GreedyOfRanks:
    """Takes the best token of every row, on every rank; two launches, which can be captured."""

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
        """See `SamplingBackend.greedy_accept`; all ranks call it for the same rows.

        Args:
            logits_SC: this rank's; columns of padding behind them are left alone.
        """
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


def make(
    sampling: TritonSampling, gpu: Gpu, share: Share, ranks: int, vocab: int, columns: int
) -> GreedyOfRanks | None:
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
    return GreedyOfRanks(sampling, gpu, box, first, min(columns, vocab - first), vocab)

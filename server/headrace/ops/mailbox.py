"""Messages between ranks inside a kernel: words that carry the number of their message.

Each rank has a box of rows in memory that all ranks' devices write. A message is a row of 32-bit
words, posted to every rank's box, each as the low half of 64 bits whose high half is the message's
number: the two halves of an aligned 8-byte store arrive together, so that whoever sees the number
has the word, without flag, fence or barrier. (What NCCL calls its LL protocol.) It sends twice the
bytes, for the shorter wait.

Messages of a row are numbered by a counter on the device, so that a graph that is replayed numbers
them anew. Odd and even ones have boxes of their own. That suffices: a rank writes message n + 2 of
a row only when it has received n + 1 from everyone, and a rank posts n + 1 when it has read n.

All ranks must launch the same kernels on a box in the same order, with the same rows.
"""

# The types of Triton's language are not those that its kernels are called with.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

# R ranks · W words of a row

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.device.peers import Peers, Share

# Bytes of a word with its message's number.
WORD_BYTES = 8
# Boxes of a row that are used in turn.
TURNS = 2


@dataclass(frozen=True)
class Mailbox:
    """A box of each rank, seen from one of them."""

    peers: Peers
    rows: int
    words: int  # of a row, even
    sent: Tensor  # int32 [rows]: the number of each row's last message

    @staticmethod
    def make(share: Share, ranks: int, rows: int, words: int) -> Mailbox | None:
        """Makes a box on every rank; None where ranks share no memory.

        Args:
            words: of a row at most.
        """
        words += words % 2
        peers = share(TURNS * ranks * rows * words * WORD_BYTES)
        if peers is None:
            return None
        sent = torch.zeros(rows, dtype=torch.int32, device=peers.memory.device)
        return Mailbox(peers, rows, words, sent)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """What kernels take: box, address_R, sent, rank."""
        words = self.peers.memory.view(torch.int64)
        return words, self.peers.address_R, self.sent, self.peers.rank

    @property
    def constants(self) -> dict[str, int]:
        """What kernels are compiled for."""
        return {"RANKS": self.peers.size, "ROWS": self.rows, "WORDS": self.words}


@triton.jit
def boxes_of(address_R, RANKS: tl.constexpr):
    """Where each rank's box is: a tuple. Nothing in a step writes addresses, so that a kernel may
    ask for them before it waits for those before it."""
    boxes = ()
    for peer in tl.static_range(RANKS):
        boxes += (tl.load(address_R + peer),)
    return boxes


@triton.jit
def unless_own(inside, word, rank, peer):
    """`inside`, where the peer is another rank. (A block compared: no scalar is a mask in Triton's
    interpreter.)"""
    return inside & (word * 0 + rank != peer)


@triton.jit
def post(
    boxes, rank, row, number, bits_W, word, inside,
    RANKS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, SELF: tl.constexpr = True,
):  # fmt: skip
    """Writes a row of words to the box of every rank.

    Args:
        boxes: what `boxes_of` returns.
        bits_W: int32.
        word: their indices in the row.
        SELF: whether this rank's box gets them, too.
    """
    message_W = (number.to(tl.int64) << 32) | (bits_W.to(tl.int64) & 0xFFFFFFFF)
    at = (((number & 1) * RANKS + rank) * ROWS + row) * WORDS + word
    for peer in tl.static_range(RANKS):
        box = boxes[peer].to(tl.pointer_type(tl.int64))
        wanted = inside if SELF else unless_own(inside, word, rank, peer)
        tl.store(tl.multiple_of(box, 16) + at, message_W, mask=wanted)


@triton.jit
def _lacks(message_W, number, inside):
    """Whether some word is another message's."""
    is_other_W = inside & ((message_W >> 32).to(tl.int32) != number)
    return tl.max(is_other_W.to(tl.int32), 0) > 0


@triton.jit
def receive(
    box, peer, row, number, word, inside,
    RANKS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Waits for a rank's words of a message; returns their bits, int32.

    Loads go past the first-level cache, which does not see what other devices write.
    """
    at = (((number & 1) * RANKS + peer) * ROWS + row) * WORDS + word
    message_W = tl.load(box + at, mask=inside, other=0, volatile=True)
    while _lacks(message_W, number, inside):
        message_W = tl.load(box + at, mask=inside, other=0, volatile=True)
    return message_W.to(tl.int32)

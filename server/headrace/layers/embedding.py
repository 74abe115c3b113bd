"""The two ends of a decoder: ids to vectors, and vectors to logits. Both divide the vocabulary."""

# T tokens · S sampled tokens · D width · V vocabulary · C this rank's columns of it

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.comm.base import Comm
from headrace.layers.build import Build
from headrace.layers.linear import ColumnLinear
from headrace.ops.rows8 import Rows8
from headrace.quant import Declares, Split


class VocabEmbedding(Declares):
    """A row of the table for each token id."""

    weight: Tensor

    def __init__(self, build: Build, vocab_size: int, width: int) -> None:
        super().__init__()
        self._ranks = build.comm.size
        self._part = build.vocab(vocab_size)
        self.declare("weight", Split(0, (self._part,)), width, build.dtype)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Returns x_TD, this rank's share of it: tokens of other ranks are zeros."""
        if self._ranks == 1:
            return F.embedding(tokens_T, self.weight)
        local_T = tokens_T - self._part.start
        elsewhere_T = (local_T < 0) | (local_T >= self._part.size)
        x_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return x_TD.masked_fill_(elsewhere_T.unsqueeze(1), 0)


class VocabHead(ColumnLinear):
    """Logits of this rank's share of the vocabulary.

    Attributes:
        columns: how many a row has. Where several ranks share the vocabulary, the last ones'
            may be padding.
        stride: numbers from one row of `whole_vocabulary`'s logits to the next.
    """

    def __init__(self, build: Build, vocab_size: int, width: int) -> None:
        part = build.vocab(vocab_size)
        super().__init__(build, width, (part,), bias=False)
        self.columns = vocab_size if build.comm.size == 1 else part.size
        self.stride = part.size * build.comm.size
        self._is_padded = self.columns != part.size

    def forward(self, x_TX: Tensor | Rows8, out_TC: Tensor | None = None) -> Tensor:
        """Returns logits_TC in the model's dtype, C being `columns`; in `out_TC`, if given."""
        if out_TC is not None and not self._is_padded:
            method = self.method
            assert method is not None, "a layer is finished before it is called"
            if method.apply_into(x_TX, out_TC):
                return out_TC
        logits_TC = super().forward(x_TX)[:, : self.columns]
        return logits_TC if out_TC is None else out_TC.copy_(logits_TC)


def whole_rows(logits_SC: Tensor, counts: list[int], comm: Comm, vocab_size: int) -> Tensor:
    """Returns logits_OV of this rank's own rows, given every rank's share of all of them.

    Args:
        counts: of the rows, so many in a row are each rank's own.
    """
    own_ROC = comm.all_to_all(logits_SC, counts)
    return own_ROC.transpose(0, 1).flatten(1)[:, :vocab_size]


def whole_vocabulary(logits_SC: Tensor, comm: Comm, vocab_size: int) -> Tensor:
    """Returns logits_SV on every rank, given each one's share."""
    if comm.size == 1:
        return logits_SC
    return comm.all_gather(logits_SC, dim=-1)[:, :vocab_size]

"""The two ends of a decoder: ids to vectors, and vectors to logits. Both divide the vocabulary."""

# T tokens · S sampled tokens · D width · V vocabulary

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from headrace.layers.build import Build
from headrace.layers.linear import ColumnLinear
from headrace.quant import Declares, Split


class VocabEmbedding(Declares):
    """A row of the table for each token id."""

    weight: Tensor

    def __init__(self, build: Build, vocab_size: int, width: int) -> None:
        super().__init__()
        self._comm = build.comm
        self._part = build.vocab(vocab_size)
        self.declare("weight", Split(0, (self._part,)), width, build.dtype)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Returns x_TD, equal on every rank."""
        if self._comm.size == 1:
            return F.embedding(tokens_T, self.weight)
        local_T = tokens_T - self._part.start
        elsewhere_T = (local_T < 0) | (local_T >= self._part.size)
        x_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        x_TD.masked_fill_(elsewhere_T.unsqueeze(1), 0)
        self._comm.all_reduce(x_TD)
        return x_TD


class VocabHead(ColumnLinear):
    """Logits of the whole vocabulary, on every rank."""

    def __init__(self, build: Build, vocab_size: int, width: int) -> None:
        self._part = build.vocab(vocab_size)
        super().__init__(build, width, (self._part,), bias=False)
        self._comm = build.comm
        self._vocab_size = vocab_size

    def forward(self, x_TX: Tensor, out_TV: Tensor | None = None) -> Tensor:
        """Returns logits_SV in the model's dtype, without the padding; in `out_TV`, if given."""
        if out_TV is not None and self._comm.size == 1 and self._part.size == self._vocab_size:
            method = self.method
            assert method is not None, "a layer is finished before it is called"
            if method.apply_into(x_TX, out_TV):
                return out_TV
        logits_SV = super().forward(x_TX)
        if self._comm.size > 1:
            logits_SV = self._comm.all_gather(logits_SV, dim=-1)
        logits_SV = logits_SV[:, : self._vocab_size]
        return logits_SV if out_TV is None else out_TV.copy_(logits_SV)

"""Sampling in PyTorch, all rows at once, whatever their parameters.

Rows are grouped by what they need: the best token (one log-softmax), a draw from the whole
vocabulary (one softmax, and a search in two levels instead of a cumulated sum), and a draw from
filtered candidates (the largest logits; everything is sorted only where they do not suffice).
Which group a row is in, and what it gives there, depends on the row alone.
"""

# S sampled rows · R rows of a group · V vocabulary · K candidates · C chunks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headrace.ops.sampling.base import (
    IN_PROMPT,
    Alternatives,
    Feature,
    Knobs,
    Plain,
    SampleRows,
    Samples,
)
from headrace.ops.sampling.groups import EDITS
from headrace.ops.sampling.watermark import green_tokens

# Candidates that a filtered row is first tried with, and how their number grows.
CANDIDATES_FIRST = 256
CANDIDATES_GROWTH = 16

# Tokens in a chunk of the search over the whole vocabulary.
CHUNK = 256

# Tokens in a chunk whose maximum is taken to find candidates.
CHUNK_OF_MAXIMA = 64


@dataclass(frozen=True)
class Search:
    """What devices do very differently fast."""

    # [R, V] → [R], int64: the first of the largest.
    argmax: Callable[[Tensor], Tensor]
    # [R, V], [R, 1] → the rows and the tokens, int64, of all that are not less than the bound.
    at_least: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Drawn:
    """A group's tokens, and the distribution they are reported from."""

    token_R: Tensor
    logprob_R: Tensor
    logprob_RK: Tensor  # over the vocabulary, or over the candidates
    token_RK: Tensor | None  # the candidates' ids; None for the whole vocabulary


class BatchedSampling(Plain):
    """The sampler of every device that has nothing better."""

    def __init__(self, search: Search) -> None:
        self._search = search

    def bad_rows(self, logits_SV: Tensor) -> Tensor:
        return ~logits_SV.amax(1).isfinite()

    def sample(self, logits_SV: Tensor, rows: SampleRows) -> Samples:
        features = Feature(int(np.bitwise_or.reduce(rows.features_S)))
        if not features:
            drawn = self._best(logits_SV)
            bad_S = ~drawn.logprob_R.isfinite()
            return Samples(drawn.token_R, drawn.logprob_R.nan_to_num_(0, 0, 0), bad_S)
        bad_S = self.bad_rows(logits_SV)
        x_SV = _edit(logits_SV, rows, features)
        rows_S = np.arange(len(rows.features_S))
        token_S = torch.zeros(len(rows_S), dtype=torch.int64, device=x_SV.device)
        logprob_S = torch.zeros(len(rows_S), dtype=torch.float32, device=x_SV.device)
        alternatives: list[Alternatives] = []
        sorts = Feature.FILTERED | Feature.TYPICAL
        is_sampled_S = (rows.features_S & Feature.SAMPLED) != 0
        is_sorted_S = is_sampled_S & ((rows.features_S & sorts) != 0)
        groups = (
            (self._best_of, rows_S[~is_sampled_S]),
            (_draw_whole, rows_S[is_sampled_S & ~is_sorted_S]),
            (self._draw_filtered, rows_S[is_sorted_S]),
        )
        for draw, row_R in groups:
            if not row_R.size:
                continue
            index_R = torch.from_numpy(row_R).to(x_SV.device)
            x_RV = x_SV if row_R.size == rows_S.size else x_SV.index_select(0, index_R)
            drawn = draw(x_RV, rows, row_R, index_R)
            token_S.index_copy_(0, index_R, drawn.token_R)
            logprob_S.index_copy_(0, index_R, drawn.logprob_R)
            alternatives += self._alternatives(drawn, rows, row_R, raw=False)
        raw_R = rows_S[(rows.features_S & Feature.LOGPROB_RAW) != 0]
        if raw_R.size:
            index_R = torch.from_numpy(raw_R).to(x_SV.device)
            logprob_RV = logits_SV.index_select(0, index_R).log_softmax(1)
            token_R = token_S.index_select(0, index_R)
            drawn = _Drawn(token_R, _at(logprob_RV, token_R), logprob_RV, None)
            logprob_S.index_copy_(0, index_R, drawn.logprob_R)
            alternatives += self._alternatives(drawn, rows, raw_R, raw=True)
        return Samples(token_S, logprob_S.nan_to_num_(0, 0, 0), bad_S, tuple(alternatives))

    def _best(self, x_RV: Tensor) -> _Drawn:
        logprob_RV = x_RV.log_softmax(1)
        token_R = self._search.argmax(x_RV)
        return _Drawn(token_R, _at(logprob_RV, token_R), logprob_RV, None)

    def _best_of(
        self, x_RV: Tensor, rows: SampleRows, row_R: np.ndarray, index_R: Tensor
    ) -> _Drawn:
        del rows, row_R, index_R
        return self._best(x_RV)

    def _draw_filtered(
        self, x_RV: Tensor, rows: SampleRows, row_R: np.ndarray, index_R: Tensor
    ) -> _Drawn:
        """Draws among the candidates that top-k, top-p and typical-p leave, best first."""
        assert rows.knobs is not None and rows.uniform_S is not None
        vocab = x_RV.shape[1]
        knobs = Knobs(**{name: _pick(column, index_R) for name, column in vars(rows.knobs).items()})
        uniform_R = _pick(rows.uniform_S, index_R)
        # Without top-k and top-p, typical-p looks at every token.
        typical_R = (rows.features_S[row_R] & Feature.TYPICAL) != 0
        filtered_R = (rows.features_S[row_R] & Feature.FILTERED) != 0
        candidates = vocab if (typical_R & ~filtered_R).any() else min(CANDIDATES_FIRST, vocab)
        mass_R1 = _mass(x_RV, knobs)
        while True:
            best = best_first(x_RV, candidates, self._search)
            e_RK, enough = _filter(best, mass_R1, knobs, bool(typical_R.any()), candidates == vocab)
            if enough:
                break
            candidates = min(candidates * CANDIDATES_GROWTH, vocab)
        sum_R1 = e_RK.cumsum(1)[:, -1:]
        index_R1 = _first_above(e_RK, uniform_R[:, None])[:, None]
        logprob_RK = (e_RK / sum_R1).log().float()
        token_R = best.token_RK.gather(1, index_R1)[:, 0]
        return _Drawn(token_R, _at(logprob_RK, index_R1[:, 0]), logprob_RK, best.token_RK)

    def _alternatives(
        self, drawn: _Drawn, rows: SampleRows, row_R: np.ndarray, raw: bool
    ) -> list[Alternatives]:
        """The alternatives of the rows of a group that want some, from one kind of logprob."""
        is_raw_R = (rows.features_S[row_R] & Feature.LOGPROB_RAW) != 0
        wants_R = ((rows.features_S[row_R] & Feature.TOP_N) != 0) & (is_raw_R == raw)
        if not wants_R.any():
            return []
        assert rows.top_n_S is not None
        index_W = torch.from_numpy(np.flatnonzero(wants_R)).to(drawn.logprob_R.device)
        logprob_WK = drawn.logprob_RK.index_select(0, index_W)
        top_n_W = rows.top_n_S[row_R[wants_R]]
        n_W1 = torch.from_numpy(top_n_W).to(logprob_WK.device)[:, None]
        width = logprob_WK.shape[1]
        count = min(int(top_n_W.max()), width)
        best = best_first(logprob_WK, count, self._search)
        best_WK, token_WK = best.x_RK, best.token_RK
        last_W1 = best_WK.gather(1, (n_W1 - 1).clamp(max=best_WK.shape[1] - 1))
        kept_WK = (best_WK >= last_W1) & (best_WK > -torch.inf)
        if drawn.token_RK is not None:
            token_WK = drawn.token_RK.index_select(0, index_W).gather(1, token_WK)
        return [Alternatives(row_R[wants_R], kept_WK.sum(1), token_WK, best_WK)]


def _edit(logits_SV: Tensor, rows: SampleRows, features: Feature) -> Tensor:
    """All edits, in order; on a copy where somebody still wants the raw logits."""
    if not features & EDITS:
        return logits_SV
    x_SV = logits_SV.clone() if features & Feature.LOGPROB_RAW else logits_SV
    if features & Feature.WATERMARK:
        _mark(x_SV, rows)
    if features & Feature.PENALTY:
        _penalize(x_SV, rows)
    for edit in (rows.bias, rows.banned):
        if edit is not None:
            x_SV.index_put_((edit.row, edit.token), edit.value, accumulate=True)
    if rows.masks is not None and features & Feature.MASKED:
        banned_MV = rows.masks.banned(x_SV.shape[1])
        if banned_MV.shape[0] == x_SV.shape[0]:
            x_SV.add_(banned_MV)
        else:
            x_SV.index_add_(0, rows.masks.row_M, banned_MV)
    return x_SV


def _mark(x_SV: Tensor, rows: SampleRows) -> None:
    """Raises the logits of green tokens."""
    assert rows.previous_S is not None
    row_R = np.flatnonzero(rows.features_S & Feature.WATERMARK)
    index_R = torch.from_numpy(row_R).to(x_SV.device)
    green_RV = green_tokens(_pick(rows.previous_S, index_R), x_SV.shape[1], rows.watermark.gamma)
    x_SV.index_add_(0, index_R, green_RV.to(x_SV.dtype), alpha=rows.watermark.delta)


def _penalize(x_SV: Tensor, rows: SampleRows) -> None:
    """Repetition (TGI's: prompt and output, once), frequency and presence (OpenAI's: output).

    A sequence has seen few tokens of its vocabulary: only those are touched.
    """
    assert rows.knobs and rows.state_QV is not None and rows.state_slot_S is not None
    row_R = np.flatnonzero(rows.features_S & Feature.PENALTY)
    index_R = torch.from_numpy(row_R).to(x_SV.device)
    state_RV = rows.state_QV.index_select(0, rows.state_slot_S.index_select(0, index_R))
    seen_R, token_X = state_RV.nonzero(as_tuple=True)
    row_X = index_R.index_select(0, seen_R)
    count_X = state_RV[seen_R, token_X].bitwise_and_(IN_PROMPT - 1)
    x_X = x_SV[row_X, token_X]
    repetition_X = rows.knobs.repetition_S.index_select(0, row_X)
    x_X = torch.where(x_X < 0, x_X * repetition_X, x_X / repetition_X)
    x_X -= rows.knobs.frequency_S.index_select(0, row_X) * count_X
    x_X -= rows.knobs.presence_S.index_select(0, row_X) * (count_X > 0)
    x_SV[row_X, token_X] = x_X


def _draw_whole(x_RV: Tensor, rows: SampleRows, row_R: np.ndarray, index_R: Tensor) -> _Drawn:
    """Draws from the whole vocabulary, in the order of ids."""
    assert rows.knobs is not None and rows.uniform_S is not None
    x_RV = x_RV / _pick(rows.knobs.temperature_S, index_R)[:, None]
    p_RV = x_RV.softmax(1)
    if (rows.features_S[row_R] & Feature.MIN_P).any():
        floor_R1 = _pick(rows.knobs.min_p_S, index_R)[:, None] * p_RV.amax(1, keepdim=True)
        dropped_RV = p_RV < floor_R1
        p_RV.masked_fill_(dropped_RV, 0)
        x_RV.masked_fill_(dropped_RV, -torch.inf)
    token_R = _search(p_RV, _pick(rows.uniform_S, index_R))
    if (rows.features_S[row_R] & Feature.TOP_N).any():
        logprob_RV = x_RV.log_softmax(1)
        return _Drawn(token_R, _at(logprob_RV, token_R), logprob_RV, None)
    logprob_R = (_at(p_RV, token_R) / p_RV.sum(1)).log()
    return _Drawn(token_R, logprob_R, p_RV, None)


def _search(p_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The first token at which the cumulated mass exceeds the row's share `uniform_R` of it.

    Chunks are summed, the chunk is found, and only within it is the sum cumulated.
    """
    rest = p_RV.shape[1] % CHUNK
    if rest:
        p_RV = functional.pad(p_RV, (0, CHUNK - rest))
    p_RCX = p_RV.view(p_RV.shape[0], -1, CHUNK)
    mass_RC = p_RCX.sum(2).double()
    sum_RC = mass_RC.cumsum(1)
    target_R1 = uniform_R[:, None] * sum_RC[:, -1:]
    chunk_R1 = (sum_RC <= target_R1).sum(1, keepdim=True).clamp_(max=sum_RC.shape[1] - 1)
    before_R1 = sum_RC.gather(1, chunk_R1) - mass_RC.gather(1, chunk_R1)
    share_R1 = (target_R1 - before_R1) / mass_RC.gather(1, chunk_R1)
    p_RX = p_RCX.gather(1, chunk_R1[:, :, None].expand(-1, 1, CHUNK))[:, 0]
    token_R = chunk_R1[:, 0] * CHUNK + _first_above(p_RX.double(), share_R1)
    # Only a row without a number in it can point into the padding.
    return token_R.clamp_(max=p_RV.shape[1] - 1 - (CHUNK - rest) % CHUNK)


def _first_above(p_RK: Tensor, share_R1: Tensor) -> Tensor:
    """The first entry at which the cumulated sum exceeds a share of the whole sum; float64."""
    sum_RK = p_RK.cumsum(1)
    # Below the whole sum even where the share was rounded to 1.
    target_R1 = torch.minimum(share_R1 * sum_RK[:, -1:], sum_RK[:, -1:] * (1 - 2.0**-52))
    return (sum_RK <= target_R1).sum(1).clamp_(max=p_RK.shape[1] - 1)


def _mass(x_RV: Tensor, knobs: Knobs) -> Tensor:
    """What all tokens weigh, the best one weighing 1; float64, [R, 1]."""
    p_RV = (x_RV / knobs.temperature_S[:, None]).softmax(1)
    return 1 / p_RV.amax(1, keepdim=True).double()


@dataclass(frozen=True)
class Best:
    """The largest logits of each row, best first, equal ones by id.

    What is not less than a row's last candidate is a candidate: no tie is cut. Rows with fewer
    candidates than others are filled up with -inf.
    """

    x_RK: Tensor
    token_RK: Tensor
    count_R: Tensor  # candidates of each row
    whole_R1: Tensor | None = None  # which rows have no other possible tokens; None: all


def best_first(x_RV: Tensor, count: int, search: Search) -> Best:
    """At least the `count` largest logits of each row.

    The count-th largest of the maxima of chunks bounds the count-th largest logit from below, so
    that one comparison finds what has to be sorted.
    """
    rows, vocab = x_RV.shape
    chunks = vocab // CHUNK_OF_MAXIMA
    if count >= chunks:
        best = x_RV.sort(dim=1, descending=True, stable=True)
        return Best(best.values, best.indices, best.indices.new_full((rows,), vocab))
    maxima_RC = x_RV[:, : chunks * CHUNK_OF_MAXIMA].view(rows, chunks, CHUNK_OF_MAXIMA).amax(2)
    bound_R1 = maxima_RC.topk(count, dim=1).values[:, -1:]
    # A mask may leave fewer possible tokens than are asked for: no other is a candidate.
    whole_R1 = bound_R1 == -torch.inf
    bound_R1 = bound_R1.clamp_min(torch.finfo(x_RV.dtype).min)
    row_X, token_X = search.at_least(x_RV, bound_R1)
    count_R = row_X.bincount(minlength=rows)
    first_R = count_R.cumsum(0) - count_R
    column_X = torch.arange(row_X.numel(), device=x_RV.device) - first_R.index_select(0, row_X)
    shape = (rows, max(int(count_R.max()), 1))  # A row of NaN has no candidates.
    x_RK = x_RV.new_full(shape, -torch.inf)
    x_RK[row_X, column_X] = x_RV[row_X, token_X]
    token_RK = row_X.new_zeros(shape)
    token_RK[row_X, column_X] = token_X
    best = x_RK.sort(dim=1, descending=True, stable=True)
    return Best(best.values, token_RK.gather(1, best.indices), count_R, whole_R1)


def _filter(
    best: Best, mass_R1: Tensor, knobs: Knobs, typical: bool, whole: bool
) -> tuple[Tensor, bool]:
    """What each candidate weighs, 0 if filtered out; and whether the candidates suffice.

    Args:
        mass_R1: what all tokens weigh, where top-k does not choose.
        whole: whether every token is a candidate.
    """
    x_RK = best.x_RK
    temperature_R1 = knobs.temperature_S[:, None].double()
    e_RK = ((x_RK.double() - x_RK[:, :1]) / temperature_R1).exp_()
    top_k_R1 = knobs.top_k_S[:, None]
    last_R1 = (top_k_R1 - 1).clamp(0, x_RK.shape[1] - 1)
    has_top_k_R1 = top_k_R1 > 0
    kept_RK = (x_RK >= x_RK.gather(1, last_R1)) | ~has_top_k_R1
    e_RK.masked_fill_(~kept_RK, 0)
    sum_RK = e_RK.cumsum(1)
    top_p_R1 = knobs.top_p_S[:, None].double()
    nucleus_R1 = top_p_R1 * torch.where(has_top_k_R1, sum_RK[:, -1:], mass_R1)
    if not whole:
        lacks_R1 = torch.where(
            has_top_k_R1, top_k_R1 > best.count_R[:, None], sum_RK[:, -1:] < nucleus_R1
        )
        if best.whole_R1 is not None:
            lacks_R1 &= ~best.whole_R1
        if bool(lacks_R1.any()):
            return e_RK, False
    # What precedes a token does not yet weigh enough; the best token always stays.
    kept_RK &= ((sum_RK - e_RK) < nucleus_R1) | (top_p_R1 >= 1)
    kept_RK[:, 0] = True
    e_RK.masked_fill_(~kept_RK, 0)
    if typical:
        _keep_typical(e_RK, knobs.typical_p_S[:, None].double())
    e_RK.masked_fill_(e_RK < knobs.min_p_S[:, None] * e_RK.amax(1, keepdim=True), 0)
    return e_RK, True


def _keep_typical(e_RK: Tensor, typical_p_R1: Tensor) -> None:
    """Zeroes all but the tokens whose surprise is nearest to the expected one."""
    p_RK = e_RK / e_RK.cumsum(1)[:, -1:]
    surprise_RK = -p_RK.log()
    entropy_R1 = (p_RK * surprise_RK).nan_to_num_(0).cumsum(1)[:, -1:]
    distance = (surprise_RK - entropy_R1).abs_().sort(dim=1, stable=True)
    sum_RK = p_RK.gather(1, distance.indices).cumsum(1)
    last_R1 = (sum_RK < typical_p_R1).sum(1, keepdim=True).clamp_(max=e_RK.shape[1] - 1)
    bound_R1 = distance.values.gather(1, last_R1)
    dropped_RK = (surprise_RK - entropy_R1).abs_() > bound_R1
    e_RK.masked_fill_(dropped_RK & (typical_p_R1 < 1), 0)


def _pick(column_S: Tensor, index_R: Tensor) -> Tensor:
    return column_S.index_select(0, index_R)


def _at(x_RV: Tensor, token_R: Tensor) -> Tensor:
    return x_RV.gather(1, token_R[:, None])[:, 0]

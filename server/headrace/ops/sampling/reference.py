"""Sampling in plain PyTorch, one row at a time, in float64: what the fast path must equal."""

# S sampled rows · V vocabulary · K candidates

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headrace.ops.sampling.base import (
    IN_PROMPT,
    Alternatives,
    Edits,
    Feature,
    Plain,
    SampleRows,
    Samples,
)
from headrace.ops.sampling.watermark import is_green


class ReferenceSampling(Plain):
    """Rows are independent: each is treated as if it were alone."""

    def bad_rows(self, logits_SV: Tensor) -> Tensor:
        return torch.tensor([_is_bad(x_V) for x_V in logits_SV])

    def sample(self, logits_SV: Tensor, rows: SampleRows) -> Samples:
        tokens: list[int] = []
        logprobs: list[float] = []
        bad: list[bool] = []
        alternatives: list[Alternatives] = []
        for row, given_V in enumerate(logits_SV):
            bad.append(_is_bad(given_V))
            x_V = torch.zeros_like(given_V) if bad[-1] else given_V
            features = Feature(int(rows.features_S[row]))
            edited_V = _edit(x_V.double(), row, features, rows)
            if features & Feature.SAMPLED:
                warped_V = _warp(edited_V, row, features, rows)
                token = _draw(warped_V, row, features, rows)
            else:
                warped_V = edited_V
                token = int(edited_V.argmax())
            if features & Feature.LOGPROB_RAW:
                warped_V = x_V.double()
            logprob_V = warped_V.log_softmax(0)
            tokens.append(token)
            logprobs.append(0.0 if bad[-1] else float(logprob_V[token]))
            if features & Feature.TOP_N:
                assert rows.top_n_S is not None
                alternatives.append(_alternatives(logprob_V, row, int(rows.top_n_S[row])))
        return Samples(
            torch.tensor(tokens), torch.tensor(logprobs), torch.tensor(bad), tuple(alternatives)
        )


def _is_bad(x_V: Tensor) -> bool:
    return bool(x_V.isnan().any() or (x_V == torch.inf).any() or (x_V == -torch.inf).all())


def _edit(x_V: Tensor, row: int, features: Feature, rows: SampleRows) -> Tensor:
    """Watermark, penalties, bias, bans and masks."""
    x_V = x_V.clone()
    if features & Feature.WATERMARK:
        assert rows.previous_S is not None
        previous = int(rows.previous_S[row])
        for token in range(len(x_V)):
            if is_green(previous, token, rows.watermark.gamma):
                x_V[token] += rows.watermark.delta
    if features & Feature.PENALTY:
        assert rows.knobs and rows.state_QV is not None and rows.state_slot_S is not None
        state_V = rows.state_QV[int(rows.state_slot_S[row])]
        for token in state_V.nonzero()[:, 0].tolist():
            count = int(state_V[token]) % IN_PROMPT
            # TGI: on every token of prompt and output, once.
            repetition = float(rows.knobs.repetition_S[row])
            x_V[token] = x_V[token] * repetition if x_V[token] < 0 else x_V[token] / repetition
            # OpenAI: generated tokens only.
            x_V[token] -= float(rows.knobs.frequency_S[row]) * count
            x_V[token] -= float(rows.knobs.presence_S[row]) * (count > 0)
    for edits in (rows.bias, rows.banned):
        if edits is not None:
            _apply(edits, row, x_V)
    if features & Feature.MASKED:
        assert rows.masks is not None
        at = rows.masks.row_M.tolist().index(row)
        word_W = rows.masks.bits_MW[at].tolist()
        for token in range(len(x_V)):
            if not word_W[token // 32] >> (token % 32) & 1:
                x_V[token] = -torch.inf
    return x_V


def _apply(edits: Edits, row: int, x_V: Tensor) -> None:
    for of, token, value in zip(edits.row, edits.token, edits.value, strict=True):
        if int(of) == row:
            x_V[int(token)] += float(value)


def _warp(x_V: Tensor, row: int, features: Feature, rows: SampleRows) -> Tensor:
    """Temperature and filters; what is filtered out becomes -inf."""
    assert rows.knobs is not None
    x_V = x_V / float(rows.knobs.temperature_S[row])
    top_k = int(rows.knobs.top_k_S[row])
    if 0 < top_k < len(x_V):
        kth = x_V.sort(descending=True).values[top_k - 1]
        x_V = x_V.masked_fill(x_V < kth, -torch.inf)  # tokens tied with the k-th stay
    top_p = float(rows.knobs.top_p_S[row])
    if top_p < 1:
        p_V = x_V.softmax(0)
        mass = 0.0
        for token in _best_first(x_V):
            if mass >= top_p:
                x_V[token] = -torch.inf
            mass += float(p_V[token])
    if features & Feature.TYPICAL:
        x_V = _typical(x_V, float(rows.knobs.typical_p_S[row]))
    min_p = float(rows.knobs.min_p_S[row])
    if min_p > 0:
        p_V = x_V.softmax(0)
        x_V = x_V.masked_fill(p_V < min_p * p_V.max(), -torch.inf)
    return x_V


def _typical(x_V: Tensor, typical_p: float) -> Tensor:
    """Keeps the tokens whose surprise is nearest to the expected one, until their mass suffices."""
    logprob_V = x_V.log_softmax(0)
    p_V = logprob_V.exp()
    entropy = -(p_V * logprob_V).nansum()
    distance_V = (-logprob_V - entropy).abs()
    mass = 0.0
    bound = torch.inf
    for token in distance_V.sort(stable=True).indices.tolist():
        mass += float(p_V[token])
        bound = distance_V[token]
        if mass >= typical_p:
            break
    return x_V.masked_fill(distance_V > bound, -torch.inf)


def _draw(x_V: Tensor, row: int, features: Feature, rows: SampleRows) -> int:
    """The first token at which the cumulated mass exceeds the row's number.

    The tokens are in the order of their ids or, where they had to be sorted anyway, best first.
    """
    assert rows.uniform_S is not None
    sort = features & (Feature.FILTERED | Feature.TYPICAL)
    order = _best_first(x_V) if sort else list(range(len(x_V)))
    p_V = x_V.softmax(0)
    mass, chosen = 0.0, order[0]
    for token in order:
        if float(p_V[token]) > 0:
            chosen = token
            mass += float(p_V[token])
            if mass > float(rows.uniform_S[row]):
                break
    return chosen


def _best_first(x_V: Tensor) -> list[int]:
    return x_V.sort(descending=True, stable=True).indices.tolist()


def _alternatives(logprob_V: Tensor, row: int, n: int) -> Alternatives:
    """The n best and what is tied with the n-th, without the impossible ones."""
    order = _best_first(logprob_V)
    last = logprob_V[order[min(n, len(order)) - 1]]
    kept = [t for t in order if logprob_V[t] >= last and logprob_V[t] > -torch.inf]
    return Alternatives(
        np.array([row]),
        torch.tensor([len(kept)]),
        torch.tensor([kept]),
        logprob_V[kept].float()[None],
    )

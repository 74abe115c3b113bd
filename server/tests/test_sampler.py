"""The batched sampler against its plain twin, and what both promise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.device.cpu import CpuDevice
from headrace.ops import sampling
from headrace.ops.sampling import (
    IN_PROMPT,
    Edits,
    Feature,
    Masks,
    SampleRows,
    Samples,
    uniform,
)
from headrace.slots import KNOBS, features_of, knobs_of
from headrace.wire import Sampling

FAST = sampling.select(CpuDevice(threads=1))
PLAIN = sampling.select(CpuDevice(threads=1), reference=True)
BACKENDS = pytest.mark.parametrize("backend", [FAST, PLAIN], ids=["batched", "reference"])

GRID = [
    Sampling(),
    Sampling(top_n=3),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.6, seed=2, top_n=4),
    Sampling(temperature=1.5, seed=3, min_p=0.05),
    Sampling(temperature=1.0, seed=4, top_k=1),
    Sampling(temperature=1.0, seed=5, top_k=7, top_n=9),
    Sampling(temperature=0.8, seed=6, top_p=0.5),
    Sampling(temperature=1.3, seed=7, top_p=0.999),
    Sampling(temperature=1.0, seed=8, typical_p=0.3),
    Sampling(temperature=1.0, seed=9, top_k=300, top_p=0.9, typical_p=0.8, min_p=0.01),
    Sampling(temperature=1.0, seed=10, repetition_penalty=1.4),
    Sampling(repetition_penalty=0.7, frequency_penalty=0.3, presence_penalty=-0.4, top_n=2),
    Sampling(temperature=0.9, seed=11, top_p=0.8, logprob_raw=True, top_n=3),
    Sampling(bias_token=(3, 5, 3), bias=(2.0, 40.0, 1.0), logprob_raw=True),
    Sampling(tokens_min=4, ending_token=(1, 2), bias_token=(1, 2), bias=(30.0, 30.0)),
    Sampling(temperature=2.0, seed=12, presence_penalty=1.0, top_k=20, logprob_raw=True),
]


def rows_of(samplings: list[Sampling], vocab: int, position: int = 9, seed: int = 0) -> SampleRows:
    """What the sampler would be given for these parameters, with made-up penalty states."""
    rng = np.random.default_rng(seed)
    table_SC = torch.tensor([[getattr(s, name) for name in KNOBS] for s in samplings])
    state = np.where(rng.random((len(samplings), vocab)) < 0.05, IN_PROMPT, 0)
    state += rng.integers(1, 4, state.shape) * (rng.random(state.shape) < 0.05)
    bias = [
        (i, t, v)
        for i, s in enumerate(samplings)
        for t, v in zip(s.bias_token, s.bias, strict=True)
    ]
    banned = [(i, t, -np.inf) for i, s in enumerate(samplings) for t in s.ending_token]
    seeds = np.array([s.seed for s in samplings], np.uint64)
    return SampleRows(
        features_S=np.array([int(features_of(s)) for s in samplings]),
        top_n_S=np.array([s.top_n for s in samplings]),
        knobs=knobs_of(table_SC, torch.tensor([s.top_k for s in samplings])),
        uniform_S=torch.from_numpy(uniform(seeds, np.full(len(samplings), position))),
        state_QV=torch.from_numpy(state.astype(np.int32)),
        state_slot_S=torch.arange(len(samplings)),
        bias=edits(bias),
        banned=edits(banned),
    )


def packed(tokens: list[int], vocab: int = 97) -> np.ndarray:
    """A row's mask, as words."""
    bits = np.zeros(-(-vocab // 32) * 32, bool)
    bits[tokens] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def masked(rows: SampleRows, row_M: list[int], allowed: list[list[int]], vocab: int) -> SampleRows:
    """The same rows, some of them with masks."""
    feature_S = rows.features_S.copy()
    feature_S[row_M] |= int(Feature.MASKED)
    bits_MW = np.stack([packed(tokens, vocab) for tokens in allowed])
    masks = Masks(torch.tensor(row_M), torch.from_numpy(bits_MW))
    return replace(rows, features_S=feature_S, masks=masks)


def few_and_many(rows: int, vocab: int, seed: int) -> list[list[int]]:
    """Masks of one token, of a few, of half of them and of all."""
    rng = np.random.default_rng(seed)
    counts = [1, min(3, vocab), vocab // 2, vocab]
    return [rng.choice(vocab, counts[i % 4], replace=False).tolist() for i in range(rows)]


def edits(flat: list[tuple[int, int, float]]) -> Edits | None:
    if not flat:
        return None
    row, token, value = zip(*flat, strict=True)
    return Edits(torch.tensor(row), torch.tensor(token), torch.tensor(value))


def tops(samples: Samples) -> dict[int, list[tuple[int, float]]]:
    """The alternatives of each row that has some."""
    found: dict[int, list[tuple[int, float]]] = {}
    for group in samples.alternatives:
        for i, row in enumerate(group.row_R.tolist()):
            count = int(group.count_R[i])
            found[row] = list(
                zip(
                    group.token_RK[i, :count].tolist(),
                    group.logprob_RK[i, :count].tolist(),
                    strict=True,
                )
            )
    return found


def compare(fast: Samples, plain: Samples) -> None:
    assert fast.token_S.tolist() == plain.token_S.tolist()
    assert fast.bad_S.tolist() == plain.bad_S.tolist()
    torch.testing.assert_close(fast.logprob_S, plain.logprob_S.float(), rtol=1e-4, atol=1e-4)
    fast_tops, plain_tops = tops(fast), tops(plain)
    assert fast_tops.keys() == plain_tops.keys()
    for row, expected in plain_tops.items():
        assert [token for token, _ in fast_tops[row]] == [token for token, _ in expected]
        assert [p for _, p in fast_tops[row]] == pytest.approx([p for _, p in expected], abs=1e-4)


def logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab", [5, 97, 256, 1000])
@pytest.mark.parametrize("position", range(4))
def test_batched_equals_reference(vocab: int, position: int):
    samplings = [s for s in GRID if vocab > max(s.bias_token, default=0)]
    x_SV = logits(len(samplings), vocab, position, scale=[3.0, 0.3, 1.0, 10.0][position])
    rows = rows_of(samplings, vocab, position, seed=position)
    compare(FAST.sample(x_SV.clone(), rows), PLAIN.sample(x_SV.clone(), rows))


@pytest.mark.parametrize("vocab", [97, 1000, 20000])
@pytest.mark.parametrize("seed", range(4))
def test_masked_rows_draw_what_they_may_and_as_the_reference(vocab: int, seed: int):
    x_SV = logits(len(GRID), vocab, seed)
    row_M = [row for row in range(len(GRID)) if (row + seed) % 3]
    allowed = few_and_many(len(row_M), vocab, seed)
    plain = rows_of(GRID, vocab, seed=seed)
    rows = masked(plain, row_M, allowed, vocab)
    fast = FAST.sample(x_SV.clone(), rows)
    compare(fast, PLAIN.sample(x_SV.clone(), rows))
    for row, tokens in zip(row_M, allowed, strict=True):
        assert int(fast.token_S[row]) in tokens
    # Rows without a mask do not notice.
    without = FAST.sample(x_SV.clone(), plain)
    for row in set(range(len(GRID))) - set(row_M):
        assert fast.token_S[row] == without.token_S[row]
        assert fast.logprob_S[row] == without.logprob_S[row]


def test_log_probabilities_are_of_what_may_be_drawn_unless_they_are_raw():
    x_SV = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2)
    rows = rows_of([Sampling(top_n=4), Sampling(top_n=4, logprob_raw=True)], 4)
    for backend in (FAST, PLAIN):
        samples = backend.sample(x_SV.clone(), masked(rows, [0, 1], [[0, 1]] * 2, 4))
        assert samples.token_S.tolist() == [1, 1]
        of_two, of_all = (x_SV[0, :2].log_softmax(0), x_SV[0].log_softmax(0))
        expected = torch.stack([of_two[1], of_all[1]])
        torch.testing.assert_close(samples.logprob_S.float(), expected)
        best = tops(samples)
        assert [token for token, _ in best[0]] == [1, 0]
        assert [token for token, _ in best[1]] == [3, 2, 1, 0]


def test_a_bad_number_that_a_mask_hides_is_seen():
    x_SV = logits(3, 97, 1)
    x_SV[1, 5] = torch.nan
    rows = masked(rows_of([Sampling()] * 3, 97), [0, 1], [[1, 2]] * 2, 97)
    for backend in (FAST, PLAIN):
        assert backend.sample(x_SV.clone(), rows).bad_S.tolist() == [False, True, False]


def test_batched_equals_reference_where_logits_tie():
    x_SV = logits(len(GRID), 600, 1).round()
    rows = rows_of(GRID, 600)
    compare(FAST.sample(x_SV.clone(), rows), PLAIN.sample(x_SV.clone(), rows))


def test_a_nucleus_wider_than_the_first_candidates_is_found():
    wide = Sampling(temperature=5.0, seed=3, top_p=0.97, top_n=2)
    rows = rows_of([wide] * 3, 5000)
    x_SV = logits(3, 5000, 2, scale=0.2)
    compare(FAST.sample(x_SV.clone(), rows), PLAIN.sample(x_SV.clone(), rows))


@BACKENDS
def test_neighbours_do_not_matter(backend: sampling.SamplingBackend):
    x_SV = logits(len(GRID), 300, 7)
    together = backend.sample(x_SV.clone(), rows_of(GRID, 300))
    together_tops = tops(together)
    everything = rows_of(GRID, 300)
    for row, sampling_ in enumerate(GRID):
        alone_rows = rows_of([sampling_], 300)
        assert everything.state_QV is not None
        object.__setattr__(alone_rows, "state_QV", everything.state_QV[row : row + 1])
        alone = backend.sample(x_SV[row : row + 1].clone(), alone_rows)
        assert int(alone.token_S) == int(together.token_S[row])
        assert float(alone.logprob_S) == pytest.approx(float(together.logprob_S[row]), abs=1e-5)
        assert [t for t, _ in tops(alone).get(0, [])] == [t for t, _ in together_tops.get(row, [])]


@BACKENDS
@pytest.mark.parametrize(
    "sampling_",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=0.7, top_p=0.8),
    ],
)
def test_draws_follow_the_distribution(backend: sampling.SamplingBackend, sampling_: Sampling):
    count = 4000 if backend is FAST else 600
    x_V = logits(1, 12, 5, scale=1.0)
    rows = rows_of([sampling_] * count, 12)
    drawn_S = uniform(np.arange(count, dtype=np.uint64), np.full(count, 3))
    object.__setattr__(rows, "uniform_S", torch.from_numpy(drawn_S))
    samples = backend.sample(x_V.expand(count, -1).clone(), rows)
    seen = torch.bincount(samples.token_S, minlength=12) / count
    expected = torch.zeros(12)
    expected[samples.token_S] = samples.logprob_S.float().exp()
    assert float((seen - expected).abs().sum()) < (0.06 if backend is FAST else 0.2)


@BACKENDS
def test_top_k_keeps_what_ties_with_the_last(backend: sampling.SamplingBackend):
    x_V = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    rows = rows_of([Sampling(temperature=1.0, top_k=2, top_n=1)] * 500, 6)
    drawn_S = uniform(np.arange(500, dtype=np.uint64), np.zeros(500))
    object.__setattr__(rows, "uniform_S", torch.from_numpy(drawn_S))
    samples = backend.sample(x_V.expand(500, -1).clone(), rows)
    assert set(samples.token_S.tolist()) == {0, 2, 3, 4}


@BACKENDS
def test_alternatives_hold_ties_and_nothing_impossible(backend: sampling.SamplingBackend):
    x_V = torch.tensor([[3.0, 2.0, 2.0, 2.0, -torch.inf, 1.0]])
    best = tops(backend.sample(x_V.clone(), rows_of([Sampling(top_n=2)], 6)))[0]
    assert [token for token, _ in best] == [0, 1, 2, 3]
    filtered = rows_of([Sampling(temperature=1.0, top_k=1, top_n=3)], 6)
    assert tops(backend.sample(x_V.clone(), filtered))[0] == [(0, 0.0)]


@BACKENDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling_", GRID[:12])
def test_a_bad_number_stays_in_its_row(
    backend: sampling.SamplingBackend, bad: float, sampling_: Sampling
):
    x_SV = logits(3, 300, 3)
    rows = rows_of([sampling_] * 3, 300)
    good = backend.sample(x_SV.clone(), rows)
    x_SV[1, 17] = bad
    samples = backend.sample(x_SV.clone(), rows)
    assert samples.bad_S.tolist() == [False, True, False]
    assert backend.bad_rows(x_SV).tolist() == [False, True, False]
    assert samples.token_S[[0, 2]].tolist() == good.token_S[[0, 2]].tolist()
    assert 0 <= int(samples.token_S[1]) < 300 and bool(samples.logprob_S.isfinite().all())


@BACKENDS
def test_nothing_but_impossible_tokens_is_bad(backend: sampling.SamplingBackend):
    x_SV = torch.full((2, 40), -torch.inf)
    x_SV[0, 3] = 0
    for sampling_ in (Sampling(), Sampling(temperature=1.0)):
        samples = backend.sample(x_SV.clone(), rows_of([sampling_] * 2, 40))
        assert samples.bad_S.tolist() == [False, True] and int(samples.token_S[0]) == 3


def test_uniform_numbers_are_pinned():
    # The same on every machine, device and version: a seed must give its tokens again.
    seeds = np.array([0, 1, 2**64 - 1], np.uint64)
    drawn = uniform(seeds, np.array([0, 1, 100000]))
    assert drawn.tolist() == [0.6524484863740322, 0.9435642308648544, 0.12423738179155697]
    many = uniform(np.full(10000, 5, np.uint64), np.arange(10000))
    assert abs(many.mean() - 0.5) < 0.01 and abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.03
    seeds = uniform(np.arange(10000, dtype=np.uint64), np.full(10000, 7))
    assert abs(seeds.mean() - 0.5) < 0.01 and abs(np.corrcoef(seeds[1:], seeds[:-1])[0, 1]) < 0.03
    assert many.min() >= 0 and many.max() < 1

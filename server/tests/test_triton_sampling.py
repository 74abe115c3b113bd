"""The sampler in Triton against its plain twin: interpreted here, for real on a device."""

# S sampled rows · V vocabulary · Z slots

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from device_here import DEVICE, device_gpu
from late import late_copy
from test_sampler import GRID, compare, edits, few_and_many, masked, rows_of, tops
from test_watermark import GRID as MARKED
from test_watermark import marked_rows

from conftest import CUDA
from headrace.ops.sampling import (
    BatchedSampling,
    Edits,
    Knobs,
    Masks,
    SampleRows,
    Samples,
    Search,
    Watermark,
)
from headrace.ops.sampling.base import empty_samples
from headrace.ops.sampling.reference import ReferenceSampling
from headrace.ops.sampling.triton import TIES_MAX, Sizes, TritonSampling
from headrace.ops.sampling.watermark import green_tokens
from headrace.wire import Sampling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
gpu = pytest.mark.gpu


def to_device(array: np.ndarray) -> Tensor:
    """Without waiting for the device, as an upload of the server's is."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(DEVICE, non_blocking=True) if CUDA else host


# So small that rows have several pieces, lists overflow and nuclei outgrow them.
SMALL = Sizes(piece=256, listed=128, candidates=8)


def triton_sampling(sizes: Sizes = SMALL) -> TritonSampling:
    return TritonSampling(device_gpu(), to_device, sizes)


def logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(DEVICE)


def check_greedy(rows: int, vocab: int, dtype: torch.dtype, sizes: Sizes) -> None:
    """Against float64, with ties, impossible tokens and bad rows among the others."""
    padded_SV = logits(rows, vocab + 3, seed=vocab).to(dtype)
    x_SV = padded_SV[:, :vocab]  # rows lie further apart than they are long
    x_SV[:, vocab // 2] = x_SV[:, vocab - 1] = x_SV.amax(1)  # ties across pieces
    x_SV[0, vocab // 3 :] = -torch.inf  # pieces without a possible token
    expected_S = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    for row, bad in enumerate([torch.nan, torch.inf, -torch.inf]):
        if 2 * row + 2 < rows:
            x_SV[2 * row + 1, vocab // 4 :] = bad
            x_SV[2 * row + 1, : vocab // 4] = bad if row == 2 else 1.0
            expected_S[2 * row + 1] = True
    samples = triton_sampling(sizes).greedy(x_SV)
    assert samples.bad_S.tolist() == expected_S.tolist()
    good_R = (~expected_S).nonzero()[:, 0]
    x_RV = x_SV[good_R].double()
    # torch does not promise the first of equals.
    first_R = (x_RV == x_RV.amax(1, keepdim=True)).int().argmax(1)
    assert samples.token_S[good_R].tolist() == first_R.tolist()
    logprob_R = x_RV.log_softmax(1).amax(1).float()
    torch.testing.assert_close(samples.logprob_S[good_R], logprob_R, rtol=1e-5, atol=1e-6)
    bad_S = ~torch.isin(torch.arange(rows, device=DEVICE), good_R)
    assert bool((samples.logprob_S[bad_S] == 0).all())
    assert 0 <= int(samples.token_S.min()) <= int(samples.token_S.max()) < vocab


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [5, 97, 509, 1024, 1300])
def test_the_best_token_is_taken(vocab: int, dtype: torch.dtype) -> None:
    check_greedy(7, vocab, dtype, SMALL)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 9, 256, 512])
def test_the_best_token_is_taken_on_a_device(rows: int, dtype: torch.dtype) -> None:
    check_greedy(rows, 128256, dtype, Sizes())
    check_greedy(rows, 50257, dtype, Sizes())


def test_the_best_tokens_become_their_slots_last_ones() -> None:
    x_SV = logits(3, 700, seed=1)
    slot_S = torch.tensor([4, 0, 2], device=DEVICE)
    last_token_Z = torch.full((6,), -1, device=DEVICE)
    out = empty_samples(x_SV)
    triton_sampling().greedy_accept(x_SV, slot_S, last_token_Z, out)
    expected = triton_sampling().greedy(x_SV)
    same(out, expected)
    found = dict(enumerate(last_token_Z.tolist()))
    assert found == {1: -1, 3: -1, 5: -1} | dict(
        zip(slot_S.tolist(), expected.token_S.tolist(), strict=True)
    )


def test_company_does_not_change_a_bit() -> None:
    x_SV = logits(40, 1300, seed=2)
    together = triton_sampling().greedy(x_SV)
    for row in (0, 17, 39):
        alone = triton_sampling().greedy(x_SV[row : row + 1])
        assert alone.logprob_S.tolist() == together.logprob_S[row : row + 1].tolist()


def same(a: Samples, b: Samples) -> None:
    """To the last bit."""
    assert a.token_S.tolist() == b.token_S.tolist() and a.bad_S.tolist() == b.bad_S.tolist()
    assert a.logprob_S.tolist() == b.logprob_S.tolist()


def on_device(rows: SampleRows) -> SampleRows:
    """The rows' tensors where the backend wants them."""

    def moved(value):
        if isinstance(value, Tensor):
            return value.to(DEVICE)
        if isinstance(value, Knobs | Edits | Masks):
            return type(value)(**{f.name: moved(getattr(value, f.name)) for f in fields(value)})
        return value

    # One table of knobs, as slots keep them.
    assert rows.knobs is not None
    names = [f.name for f in fields(Knobs) if f.name != "top_k_S"]
    table_SC = torch.stack([getattr(rows.knobs, name) for name in names], dim=1).to(DEVICE)
    columns = dict(zip(names, table_SC.unbind(1), strict=True))
    knobs = Knobs(top_k_S=rows.knobs.top_k_S.to(DEVICE), **columns)
    made = {f.name: moved(getattr(rows, f.name)) for f in fields(rows) if f.name != "knobs"}
    return SampleRows(knobs=knobs, **made)


def on_host(samples: Samples) -> Samples:
    alternatives = tuple(
        replace(
            a, count_R=a.count_R.cpu(), token_RK=a.token_RK.cpu(), logprob_RK=a.logprob_RK.cpu()
        )
        for a in samples.alternatives
    )
    return Samples(
        samples.token_S.cpu(), samples.logprob_S.cpu(), samples.bad_S.cpu(), alternatives
    )


def draw(x_SV: Tensor, rows: SampleRows, sizes: Sizes = SMALL) -> Samples:
    return on_host(triton_sampling(sizes).sample(x_SV.to(DEVICE).clone(), on_device(rows)))


def check_twins(x_SV: Tensor, rows: SampleRows, sizes: Sizes = SMALL) -> None:
    """The reference's tokens, log-probabilities and alternatives."""
    compare(draw(x_SV, rows, sizes), ReferenceSampling().sample(x_SV.cpu().float(), rows))


@pytest.mark.parametrize(
    ("vocab", "seed", "scale", "dtype"),
    [
        (5, 0, 3.0, torch.float32),
        (97, 1, 0.3, torch.bfloat16),
        (509, 2, 1.0, torch.float16),
        (300, 3, 10.0, torch.float32),
        (1024, 4, 2.0, torch.bfloat16),
    ],
    ids=str,
)
def test_all_features_beside_each_other(
    vocab: int, seed: int, scale: float, dtype: torch.dtype
) -> None:
    samplings = [s for s in GRID if vocab > max(s.bias_token, default=0)]
    x_SV = logits(len(samplings), vocab, seed, scale).to(dtype)
    check_twins(x_SV, rows_of(samplings, vocab, seed, seed=seed))


@pytest.mark.parametrize(
    ("vocab", "seed", "dtype"),
    [(97, 0, torch.float32), (509, 1, torch.bfloat16), (1000, 2, torch.float16)],
    ids=str,
)
def test_masked_rows_beside_each_other(vocab: int, seed: int, dtype: torch.dtype) -> None:
    x_SV = logits(len(GRID), vocab, seed).to(dtype)
    row_M = [row for row in range(len(GRID)) if (row + seed) % 3 or row in (3, 4)]
    allowed = few_and_many(len(row_M), vocab, seed)
    plain = rows_of(GRID, vocab, seed=seed)
    rows = masked(plain, row_M, allowed, vocab)
    check_twins(x_SV, rows)
    drawn, without = draw(x_SV, rows), draw(x_SV, plain)
    for row in set(range(len(GRID))) - set(row_M):
        assert drawn.token_S[row] == without.token_S[row]
        assert drawn.logprob_S[row] == without.logprob_S[row]
    # No mask hides a bad number.
    for row, bad in ((3, torch.nan), (4, torch.inf)):
        hidden = next(t for t in range(vocab) if t not in allowed[row_M.index(row)] or t == 5)
        x_SV[row, hidden] = bad
    assert draw(x_SV, rows).bad_S.tolist() == [row in (3, 4) for row in range(len(GRID))]


@pytest.mark.parametrize(
    ("vocab", "seed", "watermark", "dtype"),
    [
        (5, 0, Watermark(), torch.float32),
        (97, 1, Watermark(0.1, 6.5), torch.bfloat16),
        (509, 2, Watermark(0.9, -1.5), torch.float16),
        (1000, 3, Watermark(1e-9, 9.0), torch.float32),
        (1000, 4, Watermark(1 - 1e-12, 0.3), torch.bfloat16),
    ],
    ids=str,
)
def test_marked_rows_beside_each_other(
    vocab: int, seed: int, watermark: Watermark, dtype: torch.dtype
) -> None:
    x_SV = logits(len(MARKED), vocab, seed).to(dtype)
    rows = marked_rows(MARKED, vocab, seed, watermark)
    check_twins(x_SV, rows)
    plain = [replace(s, watermark=False) for s in MARKED]
    drawn, without = draw(x_SV, rows), draw(x_SV, rows_of(plain, vocab, seed=seed))
    for row in [row for row, s in enumerate(MARKED) if not s.watermark]:
        assert drawn.token_S[row] == without.token_S[row]
        assert drawn.logprob_S[row] == without.logprob_S[row]


def test_whatever_token_comes_before_the_same_are_green() -> None:
    """By the tokens of greedy rows, which are the first green ones of equals."""
    vocab, previous = 700, [0, 1, 31, 32767, 151_935, 262_143, 2**31 - 1]
    rows = marked_rows([Sampling(watermark=True)] * len(previous), vocab)
    rows = replace(rows, previous_S=torch.tensor(previous), watermark=Watermark(0.3, 2.0))
    drawn = draw(torch.zeros((len(previous), vocab)), rows)
    green_RV = green_tokens(torch.tensor(previous), vocab, 0.3)
    assert drawn.token_S.tolist() == green_RV.int().argmax(1).tolist()
    # What the best token's log-probability says of all others.
    green_R = green_RV.sum(1).double()
    mass_R = green_R + (vocab - green_R) * torch.tensor(-2.0).double().exp()
    torch.testing.assert_close(drawn.logprob_S.double(), -mass_R.log(), rtol=1e-5, atol=1e-5)


def random_sampling(rng: np.random.Generator, vocab: int) -> Sampling:
    """Every filter is there half the time, and often at its extreme."""

    def some(*values: float, off: float) -> float:
        return float(rng.choice(values)) if rng.random() < 0.5 else off

    return Sampling(
        temperature=float(rng.choice([1e-5, 0.3, 0.8, 1.0, 2.0, 1e4])),
        seed=int(rng.integers(1 << 60)),
        top_k=int(some(1, 2, 9, 60, 300, vocab, 5 * vocab, off=0)),
        top_p=some(1e-6, 0.1, 0.5, 0.9, 0.999, off=1.0),
        typical_p=some(1e-6, 0.2, 0.9, off=1.0),
        min_p=some(1e-9, 0.02, 0.3, 1.0, off=0.0),
        top_n=int(some(1, 5, off=0)),
        logprob_raw=bool(rng.random() < 0.2),
    )


@pytest.mark.parametrize("seed", range(4))
def test_filters_in_any_combination(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([60, 509, 700]))
    samplings = [random_sampling(rng, vocab) for _ in range(9)]
    x_SV = logits(len(samplings), vocab, seed, scale=float(rng.choice([0.5, 2.0, 5.0])))
    if seed % 2:
        x_SV = x_SV.to(torch.bfloat16)
    x_SV[:, rng.integers(0, vocab, vocab // 4)] = -torch.inf
    x_SV[:, 7] = 1.0  # not all of them
    check_twins(x_SV, rows_of(samplings, vocab, seed))


def test_equal_logits_are_ranked_by_id() -> None:
    samplings = [replace(s, logprob_raw=False) for s in GRID[:14]]
    x_SV = logits(len(samplings), 600, 1).round()
    check_twins(x_SV, rows_of(samplings, 600))
    flat_SV = torch.zeros((6, 300), device=DEVICE)
    check_twins(
        flat_SV,
        rows_of(
            [
                Sampling(temperature=1.0, seed=1, top_p=0.3),
                Sampling(temperature=1.0, seed=2, top_p=0.999),
                Sampling(temperature=1.0, seed=3, top_k=5, top_p=0.5),
                Sampling(temperature=1.0, seed=4, typical_p=0.5),
                Sampling(temperature=1.0, seed=5, min_p=1.0),
                Sampling(),
            ],
            300,
        ),
    )


WIDE = [
    Sampling(temperature=1.0, top_p=0.3),
    Sampling(temperature=1.0, top_p=0.95),
    Sampling(temperature=4.0, top_p=0.999, top_n=3),
    Sampling(temperature=1.0, top_k=400),
    Sampling(temperature=1.0, top_k=700, top_p=0.9, min_p=0.5),
    Sampling(temperature=1.0, typical_p=0.6),
    Sampling(temperature=1.0, top_p=0.9, typical_p=0.2, top_n=4),
    Sampling(temperature=0.01, top_p=0.9, typical_p=0.9, min_p=0.1),
]


def wide(count: int, ties: bool = False) -> list[Sampling]:
    """
    Args:
        ties: whether more alternatives may tie than are told; then none are wanted.
    """
    cycled = [WIDE[i % len(WIDE)] for i in range(count)]
    return [replace(s, seed=i, top_n=0 if ties else s.top_n) for i, s in enumerate(cycled)]


@pytest.mark.parametrize(
    ("centre", "dtype"),
    [(-7.0, torch.bfloat16), (0.0, torch.float32), (0.0, torch.float16), (7.0, torch.float32)],
    ids=str,
)
def test_a_mass_so_flat_that_no_list_holds_it(centre: float, dtype: torch.dtype) -> None:
    x_SV = (centre + logits(8, 900, 5, scale=0.2)).to(dtype)
    check_twins(x_SV, rows_of(wide(8, ties=dtype != torch.float32), 900))


def test_more_ties_at_a_threshold_than_a_list_holds() -> None:
    for at, dtype in ((0.0, torch.float32), (3.0, torch.bfloat16)):
        x_SV = torch.full((8, 600), at)
        x_SV[:, ::3] += 0.5
        x_SV[:, 1::3] -= 0.25
        x_SV[::3, 7] += 4.0
        x_SV[1::3, :40:2] = -torch.inf
        check_twins(x_SV.to(dtype), rows_of(wide(8, ties=True), 600))


def test_logits_at_the_ends_of_their_range() -> None:
    filters = [*WIDE, Sampling(temperature=1e-5, top_p=0.5), Sampling(temperature=1e4, top_p=0.5)]
    x_SV = logits(len(filters), 600, 4)
    x_SV[:, ::2] *= 1e20
    x_SV[:, 1::4] *= 1e-30
    x_SV[:, 3] = -3e38
    check_twins(x_SV, rows_of(filters, 600))
    x_SV[:, ::2] = -3e38
    check_twins(x_SV, rows_of(filters, 600))


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_first_and_the_last_number_draw_what_filters_leave(scale: float) -> None:
    samplings = wide(8)
    x_SV = logits(8, 600, 6, scale)
    rows = rows_of(samplings, 600)
    assert rows.uniform_S is not None
    first = draw(x_SV, replace(rows, uniform_S=torch.zeros_like(rows.uniform_S)))
    last = draw(x_SV, replace(rows, uniform_S=torch.full_like(rows.uniform_S, 1 - 2.0**-53)))
    near = torch.full_like(rows.uniform_S, 1 - 1e-5)
    expected = ReferenceSampling().sample(x_SV, replace(rows, uniform_S=near))
    row_S = torch.arange(8)
    best_S, near_S, last_S = (x_SV[row_S, samples.token_S] for samples in (first, expected, last))
    assert bool((best_S >= near_S).all()) and bool((near_S >= last_S).all())
    assert rows.knobs is not None
    told_S = (first.logprob_S - last.logprob_S) * rows.knobs.temperature_S
    torch.testing.assert_close(told_S, (best_S - last_S).cpu(), rtol=1e-4, atol=1e-4)
    for sampling, x_V, x in zip(samplings, x_SV, last_S, strict=True):
        if sampling.typical_p == 1 and sampling.top_k > 0 and sampling.top_p == 1:
            assert x == x_V.sort(descending=True).values[sampling.top_k - 1]


def test_neither_company_nor_how_a_row_is_searched_shows_in_another() -> None:
    samplings = wide(8)
    flat_SV = logits(8, 700, 8, scale=0.1)
    steep_SV = logits(8, 700, 9, scale=4.0)
    x_SV = torch.cat([flat_SV, steep_SV])[torch.arange(16).view(2, 8).T.reshape(-1)]
    samplings = [s for s in samplings for _ in range(2)]
    together = draw(x_SV, rows_of(samplings, 700))
    for row in range(16):
        alone = draw(x_SV[row : row + 1], rows_of([samplings[row]], 700))
        assert alone.token_S.tolist() == together.token_S[row : row + 1].tolist()
        assert alone.logprob_S.tolist() == together.logprob_S[row : row + 1].tolist()
        assert tops(alone).get(0) == tops(together).get(row)


def test_more_ties_than_are_told_are_left_out() -> None:
    samples = draw(torch.zeros((1, 300)), rows_of([Sampling(top_n=2)], 300))
    assert [token for token, _ in tops(samples)[0]] == list(range(2 + TIES_MAX))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_in_its_row(bad: float) -> None:
    chosen = [s for s in GRID[:11:2] if s.top_n == 0]
    samplings = [s for sampling in chosen for s in (sampling, sampling)]
    x_SV = logits(len(samplings), 300, 3)
    x_SV[1::2] = x_SV[::2]
    rows = rows_of(samplings, 300)
    good = draw(x_SV, rows)
    x_SV[1::2, 17] = bad
    samples = draw(x_SV, rows)
    assert samples.bad_S.tolist() == [False, True] * len(chosen)
    assert samples.token_S[::2].tolist() == good.token_S[::2].tolist()
    assert samples.logprob_S[::2].tolist() == good.logprob_S[::2].tolist()
    assert bool((samples.logprob_S[1::2] == 0).all())
    assert 0 <= int(samples.token_S.min()) <= int(samples.token_S.max()) < 300


def test_neither_company_nor_repetition_changes_a_bit() -> None:
    samplings = [s for s in GRID if not s.needs_history()]
    x_SV = logits(len(samplings), 509, 7)
    rows = rows_of(samplings, 509)
    together = draw(x_SV, rows)
    same(together, draw(x_SV, rows))
    # Not beside rows with bias, which make a step's logits float32: they are that already.
    for row in (3, 6, 9):
        alone = draw(x_SV[row : row + 1], rows_of(samplings[row : row + 1], 509))
        assert alone.token_S.tolist() == together.token_S[row : row + 1].tolist()
        assert alone.logprob_S.tolist() == together.logprob_S[row : row + 1].tolist()
        assert tops(alone).get(0) == tops(together).get(row)


def mixed(count: int) -> list[Sampling]:
    return [replace(GRID[i % len(GRID)], seed=i + 1) for i in range(count)]


REAL_VOCAB = 128256


@gpu
def test_a_real_vocabulary_beside_the_reference() -> None:
    samplings = [GRID[i] for i in (1, 3, 4, 6, 7, 13)]  # a second a row, in the reference
    x_SV = logits(len(samplings), REAL_VOCAB, 5, scale=2.5).to(torch.bfloat16)
    check_twins(x_SV, rows_of(samplings, REAL_VOCAB), Sizes())


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_rows_beside_the_batched_sampler(dtype: torch.dtype) -> None:
    samplings = mixed(256)
    x_SV = logits(256, REAL_VOCAB, 6, scale=2.0).to(dtype)
    rows = on_device(rows_of(samplings, REAL_VOCAB))

    def at_least(x_RV: Tensor, bound_R1: Tensor) -> tuple[Tensor, Tensor]:
        row_X, token_X = (x_RV >= bound_R1).nonzero(as_tuple=True)
        return row_X, token_X

    batched = BatchedSampling(Search(lambda x_RV: x_RV.argmax(1), at_least))
    drawn = triton_sampling(Sizes()).sample(x_SV.clone(), rows)
    # A draw so near to the boundary of two tokens may fall on either side of it.
    assert rows.uniform_S is not None
    near = [
        batched.sample(
            x_SV.float(), replace(rows, uniform_S=(rows.uniform_S + shift).clamp(0, 1 - 1e-12))
        )
        for shift in (0.0, -2e-6, 2e-6, -2e-5, 2e-5)
    ]
    # Both samplers weigh in float32 here: of 100,000 tokens that weigh about the same, the last
    # one that a filter leaves is not always the same one.
    is_one_S = torch.stack([drawn.token_S == s.token_S for s in near]).any(0)
    assert int((~is_one_S).sum()) <= 2, (~is_one_S).nonzero()[:, 0].tolist()
    assert int((drawn.token_S == near[0].token_S).sum()) >= 245
    agrees_S = drawn.token_S == near[0].token_S
    torch.testing.assert_close(
        drawn.logprob_S[agrees_S], near[0].logprob_S[agrees_S], rtol=1e-4, atol=1e-4
    )
    again = triton_sampling(Sizes()).sample(x_SV.clone(), rows)
    same(drawn, again)


@gpu
def test_nothing_waits_for_the_device() -> None:
    backend = triton_sampling(Sizes())
    x_SV = logits(len(GRID), REAL_VOCAB, 8).to(torch.bfloat16)
    rows = on_device(rows_of(GRID, REAL_VOCAB))
    backend.prepare(REAL_VOCAB, x_SV.dtype, DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        backend.sample(x_SV, rows)
        backend.greedy(x_SV)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@gpu
def test_behind_a_predecessor_that_writes_late() -> None:
    if not device_gpu().pdl:
        pytest.skip("the device has no programmatic dependent launch")
    backend = triton_sampling(Sizes())
    source_SV = logits(3, 9000, 9)
    expected = backend.greedy(source_SV)
    x_SV = torch.zeros_like(source_SV)
    torch.cuda.synchronize()
    late_copy(source_SV, x_SV)
    same(backend.greedy(x_SV), expected)


@gpu
def test_greedy_can_be_captured() -> None:
    backend = triton_sampling(Sizes())
    x_SV = logits(5, REAL_VOCAB, 10).to(torch.bfloat16)
    slot_S = torch.arange(5, device=DEVICE)
    last_token_Z = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    out = empty_samples(x_SV)
    backend.greedy_accept(x_SV, slot_S, last_token_Z, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.greedy_accept(x_SV, slot_S, last_token_Z, out)
    for seed in (11, 12):
        x_SV.copy_(logits(5, REAL_VOCAB, seed))
        graph.replay()
        same(out, backend.greedy(x_SV))
        assert last_token_Z[:5].tolist() == out.token_S.tolist()


def test_prepared_for_every_kind_of_step() -> None:
    triton_sampling().prepare(60, torch.bfloat16, DEVICE)


def test_edits_of_one_token_add_up() -> None:
    x_SV = torch.zeros((2, 300), device=DEVICE)
    rows = rows_of([Sampling(), Sampling(temperature=1.0, top_k=1)], 300)
    bias = edits([(0, 7, 1.0), (0, 7, 1.5), (0, 9, 2.0), (1, 9, 2.0), (1, 7, 1.0)])
    features_S = rows.features_S | 32
    samples = draw(x_SV, replace(rows, bias=bias, features_S=features_S))
    assert samples.token_S.tolist() == [7, 9]

"""Kernels through which ranks exchange rows: in the interpreter, or on a GPU a rank."""

# T tokens · D width · S rows · V vocabulary · C a rank's columns of it

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from device_here import DEVICE
from ranks import Rank, run_processes

from conftest import CUDA
from headrace.ops.mailbox import Mailbox
from headrace.ops.reduce_norm.reference import reduce_norm
from headrace.ops.reduce_norm.triton import TritonReduceNorms
from headrace.ops.sampling import Feature, Knobs, SampleRows
from headrace.ops.sampling.base import empty_samples
from headrace.ops.sampling.ranks import make as make_sampling
from headrace.ops.sampling.reference import ReferenceSampling
from headrace.ops.sampling.triton import Sizes, TritonSampling

# Ranks start and run inside a fixture, as slowly as they may.
pytestmark = pytest.mark.timeout(600)

EPS = 1e-5
# (rows, width): each after the other through one mailbox, so that rows are skipped and come back.
CALLS_HERE = [(1, 96), (3, 96), (2, 96), (1, 96), (5, 96), (3, 96), (1, 96), (4, 96)]
CALLS_GPU = [(1, 4096), (8, 4096), (64, 4096), (1, 4096), (100, 4096), (33, 4096), (128, 4096)]
CALLS = CALLS_GPU if CUDA else CALLS_HERE
# A unit in the last place for the norm, whose sum is taken in another order; the interpreter cuts
# off what a cast to bfloat16 leaves, for each of the casts.
ULP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
UNITS = 2 if DEVICE.type == "cuda" else 6
VOCAB = 310
# Turns in which best tokens are taken, and in which tokens are drawn.
BESTS, DRAWS = 3, 6
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pause(rank: Rank, turn: int) -> None:
    """Now one rank is late, now the other."""
    time.sleep(0.002 * ((turn * 7 + rank.rank * 3) % 5))


def reduced(rank: Rank, sizes: list[tuple[int, int]], dtype: torch.dtype) -> list[np.ndarray]:
    """The norms and streams that a rank finds."""
    make = TritonReduceNorms(rank.gpu, dtype)
    found: list[np.ndarray] = []
    for turn, (rows, width) in enumerate(sizes):
        op = make(rank.share, rank.size, width)
        assert op is not None and op is make(rank.share, rank.size, width)
        weight_D = numbers(1, width, dtype=dtype).to(rank.device)
        x_TD = numbers(100 * turn + rank.rank, rows, width, dtype=dtype).to(rank.device)
        residual = numbers(50 + turn, rows, width, dtype=dtype).to(rank.device)
        pause(rank, turn)
        before = x_TD.clone()
        y_TD, stream = op(x_TD, None if turn % 3 == 2 else residual, weight_D, EPS)
        assert torch.equal(x_TD, before)
        assert stream.data_ptr() == residual.data_ptr() or turn % 3 == 2
        found += [y_TD.float().cpu().numpy(), stream.float().cpu().numpy()]
    return found


def rows_of_logits(dtype: torch.dtype) -> Tensor:
    """Rows whose best token is on any rank, ties, rows without tokens on a rank, and bad ones."""
    x_SV = numbers(3, 9, VOCAB, dtype=dtype)
    x_SV[0, 5] = x_SV[0, 300] = 9.0  # the first of equals, on another rank than the second
    x_SV[1, 309] = 9.0
    x_SV[2, :] = -torch.inf
    x_SV[2, 7] = 1.0
    x_SV[3, :] = -torch.inf
    x_SV[3, 308] = -3.0
    x_SV[4, 301] = torch.nan
    x_SV[5, 2] = torch.inf
    x_SV[6, :] = -torch.inf
    return x_SV


def chances(turn: int) -> tuple[Tensor, Tensor]:
    """Temperatures, as a column of a table, and numbers that are drawn with; 9 rows."""
    random = np.random.default_rng(turn)
    temperature_S = torch.tensor(random.choice([0.0, 0.05, 0.7, 1.0, 3.0], 9), dtype=torch.float32)
    uniform_S = torch.from_numpy(random.random(9))
    uniform_S[turn] = (0.0, 1 - 2.0**-53, 0.5)[turn % 3]
    return torch.stack((temperature_S, temperature_S), 1)[:, 0], uniform_S


def agreed(rank: Rank, dtype: torch.dtype, columns: int) -> list[list[Any]]:
    """Tokens, log-probabilities, bad rows and last tokens that a rank finds.

    Of several turns the best tokens, and then those that are drawn.
    """
    sizes = Sizes(piece=64, listed=64, candidates=64)
    sampling = TritonSampling(rank.gpu, torch.from_numpy, sizes)
    op = make_sampling(sampling, rank.gpu, rank.share, rank.size, VOCAB, columns)
    assert op is not None
    padded = torch.full((9, columns * rank.size), torch.nan, dtype=dtype)
    padded[:, :VOCAB] = rows_of_logits(dtype)
    mine = padded[:, rank.rank * columns : (rank.rank + 1) * columns].contiguous().to(rank.device)
    found: list[list[Any]] = []
    last = torch.zeros(12, dtype=torch.int64, device=rank.device)
    for turn in range(BESTS):
        pause(rank, turn)
        rows = mine[turn:]
        count = rows.shape[0]
        slot_S = torch.arange(count, device=rank.device).flip(0)
        out = empty_samples(rows)
        op.accept(rows, slot_S, last, out)
        found.append([c.tolist() for c in (out.token_S, out.logprob_S, out.bad_S, last[slot_S])])
    for turn in range(DRAWS):
        pause(rank, turn)
        temperature_S, uniform_S = (column.to(rank.device) for column in chances(turn))
        slot_S = torch.arange(9, device=rank.device)
        out = empty_samples(mine)
        op.draw(mine, temperature_S, uniform_S, slot_S, last, out)
        found.append([c.tolist() for c in (out.token_S, out.logprob_S, out.bad_S, last[slot_S])])
    return found


@dataclass(frozen=True)
class Told:
    """What a rank found, by dtype; `agreed` without padding and with it."""

    reduced: dict[torch.dtype, list[np.ndarray]]
    agreed: dict[torch.dtype, list[list[list[Any]]]]


def everything(rank: Rank) -> Told:
    even = -(-VOCAB // rank.size)
    return Told(
        {dtype: reduced(rank, CALLS, dtype) for dtype in DTYPES},
        {dtype: [agreed(rank, dtype, columns) for columns in (even, even + 9)] for dtype in DTYPES},
    )


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def told(request: pytest.FixtureRequest) -> list[Told]:
    """What the ranks of a group found: processes start once for all tests."""
    return run_processes(request.param, everything)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_normalised_alike_on_all_ranks(told: list[Told], dtype: torch.dtype) -> None:
    results = [found.reduced[dtype] for found in told]
    for other in results[1:]:
        for mine, its in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(mine, its)
    for turn, (rows, width) in enumerate(CALLS):
        partial = [numbers(100 * turn + r, rows, width, dtype=dtype) for r in range(len(told))]
        residual = None if turn % 3 == 2 else numbers(50 + turn, rows, width, dtype=dtype)
        expected = reduce_norm(partial, residual, numbers(1, width, dtype=dtype), EPS)
        for actual, wanted in zip(results[0][2 * turn : 2 * turn + 2], expected, strict=True):
            tolerance = UNITS * ULP[dtype]
            np.testing.assert_allclose(actual, wanted.float().numpy(), tolerance, tolerance)


def test_rows_that_are_no_whole_number_of_words_are_left_to_two_operations() -> None:
    def share(size: int) -> None:
        raise AssertionError(f"nothing is shared, not even {size} bytes")

    from headrace.ops.triton import INTERPRETED

    assert TritonReduceNorms(INTERPRETED, torch.bfloat16)(share, 2, 577) is None
    assert Mailbox.make(lambda size: None, 2, 4, 8) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [0, 1], ids=["no padding", "padding"])
def test_ranks_agree_on_the_best_token(told: list[Told], padded: int, dtype: torch.dtype) -> None:
    results = [found.agreed[dtype][padded] for found in told]
    assert all(result == results[0] for result in results), "not the same on all ranks"
    x_SV = rows_of_logits(dtype).float()
    expected = ReferenceSampling().sample(x_SV.clone(), SampleRows(np.zeros(9, np.int64)))
    for turn, (tokens, logprobs, bad, last) in enumerate(results[0][:BESTS]):
        wanted = expected.bad_S[turn:].tolist()
        assert bad == wanted and sum(wanted) == len([i for i in (4, 5, 6) if i >= turn])
        good = [i for i, is_bad in enumerate(bad) if not is_bad]
        assert [tokens[i] for i in good] == [expected.token_S[turn + i].item() for i in good]
        np.testing.assert_allclose(
            [logprobs[i] for i in good],
            [expected.logprob_S[turn + i].item() for i in good],
            atol=2e-6,
        )
        assert last == tokens and all(0 <= token < VOCAB for token in tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [0, 1], ids=["no padding", "padding"])
def test_ranks_draw_what_one_draws(told: list[Told], padded: int, dtype: torch.dtype) -> None:
    x_SV = rows_of_logits(dtype).float()
    drawn: set[int] = set()
    for turn, (tokens, logprobs, bad, last) in enumerate(told[0].agreed[dtype][padded][BESTS:]):
        temperature_S, uniform_S = chances(turn)
        off_S, one_S = torch.zeros(9), torch.ones(9)
        no_k_S = torch.zeros(9, dtype=torch.int64)
        knobs = Knobs(temperature_S, no_k_S, one_S, one_S, off_S, one_S, off_S, off_S)
        features_S = np.where(temperature_S.numpy() > 0, int(Feature.SAMPLED), 0)
        rows = SampleRows(features_S, knobs=knobs, uniform_S=uniform_S)
        expected = ReferenceSampling().sample(x_SV.clone(), rows)
        assert bad == expected.bad_S.tolist() and last == tokens
        good = [i for i, is_bad in enumerate(bad) if not is_bad]
        assert [tokens[i] for i in good] == [expected.token_S[i].item() for i in good], turn
        np.testing.assert_allclose(
            [logprobs[i] for i in good], [expected.logprob_S[i].item() for i in good], atol=1e-5
        )
        assert all(0 <= token < VOCAB for token in tokens)
        drawn |= set(tokens)
    assert len(drawn) > DRAWS, "draws differ"


def test_a_rank_without_tokens_leaves_it_to_gathering() -> None:
    def share(size: int) -> None:
        raise AssertionError(f"nothing is shared, not even {size} bytes")

    from headrace.ops.triton import INTERPRETED

    sampling = TritonSampling(INTERPRETED, torch.from_numpy)
    assert make_sampling(sampling, INTERPRETED, share, 3, 32, 16) is None

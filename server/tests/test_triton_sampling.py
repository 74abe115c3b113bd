"""The sampler in Triton against its plain twin: interpreted here, for real on a device."""

# S sampled rows · V vocabulary · Z slots

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from conftest import CUDA
from headrace.ops.sampling import BatchedSampling, Samples, Search
from headrace.ops.sampling.triton import TritonSampling, empty_samples
from headrace.ops.triton import INTERPRETED, Gpu

DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
gpu = pytest.mark.gpu


def device_gpu() -> Gpu:
    if not CUDA:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(DEVICE)
    capability = (properties.major, properties.minor)
    return Gpu(capability, properties.multi_processor_count, capability >= (9, 0))


def triton_sampling(piece: int = 256) -> TritonSampling:
    def at_least(x_RV: Tensor, bound_R1: Tensor) -> tuple[Tensor, Tensor]:
        row_X, token_X = (x_RV >= bound_R1).nonzero(as_tuple=True)
        return row_X, token_X

    others = BatchedSampling(Search(lambda x_RV: x_RV.argmax(1), at_least))
    return TritonSampling(device_gpu(), others, piece)


def logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(DEVICE)


def check_greedy(rows: int, vocab: int, dtype: torch.dtype, piece: int) -> None:
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
    samples = triton_sampling(piece).greedy(x_SV)
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
    check_greedy(7, vocab, dtype, piece=256)


@gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 9, 256, 512])
def test_the_best_token_is_taken_on_a_device(rows: int, dtype: torch.dtype) -> None:
    check_greedy(rows, 128256, dtype, piece=4096)
    check_greedy(rows, 50257, dtype, piece=4096)


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

"""Ranks that draw some rows each: what one rank draws, without all logits on any."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_model import VOCAB, FakeModel, fake_engine, preparation
from planner import Planner, Sequence
from test_comm import seen
from torch import Tensor

from headrace import sampler
from headrace.comm import Comm, SingleComm
from headrace.layers.step import StepContext
from headrace.runner import Runner
from headrace.sampler import divided
from headrace.testing.threads import ThreadComm, run_ranks
from headrace.wire import Plan, Result, ResultFlag, Sampling

SAMPLINGS = [
    Sampling(temperature=0.8, top_k=5, seed=1),
    Sampling(),
    Sampling(temperature=1.2, top_p=0.8, seed=2, frequency_penalty=0.3),
    Sampling(temperature=1.0, typical_p=0.7, seed=3),
    Sampling(temperature=0.7, min_p=0.05, seed=4, repetition_penalty=1.3),
    Sampling(temperature=1.0, seed=5, top_n=4),
    Sampling(bias_token=(3, 90), bias=(4.0, 5.0), top_n=2, logprob_raw=True),
    Sampling(temperature=1.0, seed=6, tokens_min=3, ending_token=(7, 8)),
    Sampling(temperature=0.9, top_p=0.5, seed=7, watermark=True),
    Sampling(temperature=1.0, seed=8, presence_penalty=0.5, logprob_raw=True),
]


class Share(FakeModel):
    """A rank's columns of the fake model's logits, padded."""

    def __init__(self, comm: Comm) -> None:
        super().__init__()
        self._rank, self._columns = comm.rank, -(-VOCAB // comm.size)

    def __call__(self, tokens_T: Tensor, step: StepContext) -> Tensor:
        logits_LV = super().__call__(tokens_T, step)
        first = self._rank * self._columns
        own_LC = logits_LV[:, first : first + self._columns]
        return torch.nn.functional.pad(own_LC, (0, self._columns - own_LC.shape[1]))


def runner(comm: Comm) -> tuple[Runner, FakeModel]:
    model = FakeModel() if comm.size == 1 else Share(comm)
    return Runner(fake_engine(model, comm), preparation(), blocks=512), model


def requests() -> list[Sequence]:
    return [Sequence([i, 3, i], 7, sampling) for i, sampling in enumerate(SAMPLINGS)]


def run(comm: Comm, poison: frozenset[int] = frozenset()) -> tuple[list[Sequence], list[int]]:
    """What was drawn, and the digest of every step, with four rows at a time."""
    made, model = runner(comm)
    model.poison |= poison
    sequences = requests()
    digests: list[int] = []

    def execute(plan: Plan) -> Result:
        result = made.execute(plan)
        digests.append(result.digest)
        return result if comm.rank == 0 else seen(made, plan, result)

    Planner(running_max=4).run(execute, sequences)
    return sequences, digests


def told_of(sequences: list[Sequence]) -> list[tuple[str, int, float]]:
    """What is told of each token, and of those that might have been in its place."""
    told: list[tuple[str, int, float]] = []
    for sequence in sequences:
        for token, (logprob, others) in zip(sequence.tokens, sequence.results, strict=True):
            told.append(("drawn", token, logprob))
            told += [("other", *other) for other in others]
    return told


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_draw_what_one_draws(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, digests = run(SingleComm())
    monkeypatch.delattr(sampler, "whole_vocabulary")  # No step gathers all logits.
    together = run_ranks(size, run)
    first = together[0][0]
    assert [sequence.tokens for sequence in first] == [sequence.tokens for sequence in alone]
    told, expected = told_of(first), told_of(alone)
    assert [(kind, token) for kind, token, _ in told] == [(k, token) for k, token, _ in expected]
    # Rows that lie elsewhere in memory are added up in another order.
    logprobs = [logprob for *_, logprob in told]
    assert logprobs == pytest.approx([logprob for *_, logprob in expected], abs=1e-5)
    assert sum(kind == "other" for kind, *_ in told) == 7 * (4 + 2)
    for sequences, its_digests in together:
        assert its_digests == digests
        assert [sequence.tokens for sequence in sequences] == [s.tokens for s in alone]


def test_a_bad_number_of_one_rank_stays_in_its_row() -> None:
    poison = frozenset({SAMPLINGS.index(SAMPLINGS[4])})  # the last token of that prompt
    (sequences, _), _ = run_ranks(2, lambda comm: run(comm, poison))
    flags = [sequence.flags[0] for sequence in sequences]
    assert flags == [int(ResultFlag.NAN) * (i == 4) for i in range(len(sequences))]


@pytest.mark.parametrize(
    ("first", "ranks", "counts"),
    [
        ("......", 2, [3, 3]),
        (".......", 3, [3, 2, 2]),
        (".", 4, [1, 0, 0, 0]),
        ("1.1...", 3, [2, 2, 2]),
        ("1111.", 2, [4, 1]),
        ("11111....", 3, [5, 2, 2]),
    ],
)
def test_rows_are_divided_evenly(first: str, ranks: int, counts: list[int]) -> None:
    is_first_R = np.array([letter == "1" for letter in first])
    rows_of = divided(is_first_R, ranks)
    assert [rows.size for rows in rows_of] == counts
    assert sorted(np.concatenate(rows_of).tolist()) == list(range(len(first)))
    assert all((np.diff(rows) > 0).all() for rows in rows_of)
    assert not is_first_R[np.concatenate(rows_of[1:])].any()


def test_each_rank_gets_its_rows() -> None:
    def rank(comm: ThreadComm) -> list[list[int]]:
        x = torch.tensor([[10 * comm.rank + row] for row in range(4)])
        return comm.all_to_all(x, [3, 1]).flatten(1).tolist()

    assert run_ranks(2, rank) == [[[0, 1, 2], [10, 11, 12]], [[3], [13]]]

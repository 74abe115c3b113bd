"""Watermarks: the rule that says what is green, what the sampler makes of it, and who sees it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_model import VOCAB, fake_engine, logits_after, preparation
from planner import Planner, Sequence
from test_sampler import BACKENDS, FAST, PLAIN, compare, logits, rows_of, tops

from headrace.ops import sampling
from headrace.ops.sampling import Feature, SampleRows, Samples, Watermark
from headrace.ops.sampling.watermark import green_tokens, is_green, z_score
from headrace.runner import Runner
from headrace.wire import Sampling

MARKED = Sampling(temperature=1.0, watermark=True)


GREEN_FROM_24 = [24, 27, 28, 29, 30, 32, 33, 34, 35, 38]


def test_the_rule_is_pinned() -> None:
    """Texts that were marked by one version are found by the next."""
    green = [token for token in range(40) if is_green(7, token, 0.5)]
    assert green == [2, 6, 7, 8, 9, 11, 13, 18, 19, 21, *GREEN_FROM_24]
    assert [is_green(previous, 128_000, 0.25) for previous in (0, 1, 2, 151_935)] == [
        False,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("gamma", [1e-9, 0.1, 0.5, 0.999, 1 - 1e-12])
def test_whole_vocabularies_are_divided_by_the_rule(gamma: float) -> None:
    previous = [0, 1, 31, 32767, 151_935, 262_143]
    green_RV = green_tokens(torch.tensor(previous), 300, gamma)
    expected = [[is_green(one, token, gamma) for token in range(300)] for one in previous]
    assert green_RV.tolist() == expected


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5, 0.9])
def test_about_gamma_of_a_vocabulary_is_green_after_any_token(gamma: float) -> None:
    rows, vocab = 200, 8_000
    green_RV = green_tokens(torch.arange(rows), vocab, gamma).double()
    deviation = (gamma * (1 - gamma)) ** 0.5
    z_R = (green_RV.mean(1) - gamma) / deviation * vocab**0.5
    z_V = (green_RV.mean(0) - gamma) / deviation * rows**0.5
    for z_X in (z_R, z_V):
        assert z_X.abs().max() < 5.5 and 0.85 < z_X.std() < 1.15
    # What is green after one token says nothing of what is green after the next one.
    together = (green_RV[:-1] * green_RV[1:]).mean(1)
    z_R = (together - gamma**2) / (gamma**2 * (1 - gamma**2)) ** 0.5 * vocab**0.5
    assert z_R.abs().max() < 5.5


GRID = [
    Sampling(watermark=True),
    Sampling(watermark=True, top_n=4),
    Sampling(temperature=1.0, seed=1, watermark=True),
    Sampling(),
    Sampling(temperature=0.7, seed=2, top_k=9, top_p=0.9, watermark=True, top_n=3),
    Sampling(temperature=1.0, seed=3),
    Sampling(temperature=1.0, seed=4, repetition_penalty=1.4, watermark=True),
    Sampling(repetition_penalty=0.7, frequency_penalty=0.3, presence_penalty=-0.4),
    Sampling(temperature=1.0, seed=5, watermark=True, logprob_raw=True, top_n=2),
    Sampling(watermark=True, bias_token=(3, 4), bias=(9.0, 9.0), tokens_min=2, ending_token=(1,)),
]


def marked_rows(
    samplings: list[Sampling], vocab: int, seed: int = 0, watermark: Watermark | None = None
) -> SampleRows:
    """As `rows_of`, with made-up previous tokens."""
    previous = np.random.default_rng(seed).integers(0, vocab, len(samplings))
    return replace(
        rows_of(samplings, vocab, seed=seed),
        previous_S=torch.from_numpy(previous),
        watermark=watermark or Watermark(),
    )


@pytest.mark.parametrize("vocab", [5, 97, 1000])
@pytest.mark.parametrize(
    "watermark", [Watermark(), Watermark(0.1, 6.5), Watermark(0.9, -1.5)], ids=str
)
def test_marked_rows_are_the_references(vocab: int, watermark: Watermark) -> None:
    x_SV = logits(len(GRID), vocab, vocab)
    rows = marked_rows(GRID, vocab, vocab, watermark)
    fast = FAST.sample(x_SV.clone(), rows)
    compare(fast, PLAIN.sample(x_SV.clone(), rows))
    # Rows without a watermark do not notice.
    plain = [replace(s, watermark=False) for s in GRID]
    without = FAST.sample(x_SV.clone(), rows_of(plain, vocab, seed=vocab))
    for row in [row for row, s in enumerate(GRID) if not s.watermark]:
        assert fast.token_S[row] == without.token_S[row]
        assert fast.logprob_S[row] == without.logprob_S[row]


@BACKENDS
def test_green_tokens_gain_before_penalties_do_anything(
    backend: sampling.SamplingBackend,
) -> None:
    """So a logit that delta lifts above 0 is divided by a repetition penalty, not multiplied."""
    vocab, previous = 64, 5
    green = [token for token in range(vocab) if is_green(previous, token, 0.5)]
    x_SV = torch.full((1, vocab), -1.0)
    rows = rows_of([Sampling(watermark=True, repetition_penalty=2.0, top_n=vocab)], vocab)
    assert rows.state_QV is not None
    rows.state_QV[:] = 1
    rows = replace(rows, previous_S=torch.tensor([previous]), watermark=Watermark(delta=4.0))
    samples = backend.sample(x_SV.clone(), rows)
    found = dict(tops(samples)[0])
    # (-1 + 4) / 2 and -1 · 2.
    best, other = found[green[0]], next(p for t, p in found.items() if t not in green)
    assert best - other == pytest.approx(1.5 + 2.0, abs=1e-5)
    assert int(samples.token_S[0]) == green[0]
    assert [t for t, p in found.items() if p == pytest.approx(best)] == green


@BACKENDS
def test_log_probabilities_are_of_the_marked_distribution(
    backend: sampling.SamplingBackend,
) -> None:
    x_SV = logits(2, 97, 3)
    samplings = [Sampling(watermark=True), Sampling(watermark=True, logprob_raw=True)]
    rows = marked_rows(samplings, 97)
    assert rows.previous_S is not None
    marked_SV = x_SV + 2.0 * green_tokens(rows.previous_S, 97, 0.5)
    samples = backend.sample(x_SV.clone(), rows)
    assert samples.token_S.tolist() == marked_SV.argmax(1).tolist()
    expected_S = torch.stack([marked_SV[0].log_softmax(0), x_SV[1].log_softmax(0)])
    expected_S = expected_S.gather(1, samples.token_S[:, None])[:, 0]
    torch.testing.assert_close(samples.logprob_S.float(), expected_S)


@BACKENDS
def test_bad_rows_stay_bad(backend: sampling.SamplingBackend) -> None:
    x_SV = logits(4, 97, 1)
    x_SV[0, 5], x_SV[1, 6], x_SV[2] = torch.nan, torch.inf, -torch.inf
    rows = marked_rows([Sampling(watermark=True)] * 4, 97)
    assert backend.sample(x_SV, rows).bad_S.tolist() == [True, True, True, False]


def drawn(sequences: list[Sequence], watermark: Watermark | None = None, **knobs: int) -> None:
    engine = replace(fake_engine(), watermark=watermark or Watermark())
    Planner(running_max=4, **knobs).run(
        Runner(engine, preparation(), blocks=512).execute, sequences
    )


def texts(sampling_: Sampling, count: int = 4, tokens: int = 120) -> list[Sequence]:
    return [Sequence([3 + i, 4, 5 + i], tokens, replace(sampling_, seed=i)) for i in range(count)]


@pytest.mark.parametrize("watermark", [Watermark(0.5, 4.0), Watermark(0.25, 5.0)], ids=str)
def test_marked_texts_are_detected_and_no_others(watermark: Watermark) -> None:
    # The fake model's logits lie far apart, so that it takes a larger delta than a real one.
    marked, plain = texts(MARKED), texts(replace(MARKED, watermark=False))
    drawn(marked + plain, watermark)
    for text in marked:
        assert z_score([text.prompt[-1], *text.tokens], watermark.gamma) > 4
        assert abs(z_score(reversed(text.tokens), watermark.gamma)) < 4, "by another rule"
    for text in plain:
        assert abs(z_score(text.tokens, watermark.gamma)) < 4


def test_texts_that_repeat_themselves_are_not_taken_for_marked_ones() -> None:
    green = next(t for t in range(50) if is_green(7, t, 0.5) and is_green(t, 7, 0.5))
    assert z_score([7, green] * 500, 0.5) < 2
    assert z_score([], 0.5) == z_score([7], 0.5) == 0.0


def test_every_token_is_marked_by_the_one_before_it() -> None:
    """The first by the prompt's last one, each later one by one that only the device knows."""
    texts_ = [
        Sequence([9], 30, replace(MARKED, temperature=0.0)),
        Sequence([1, 2, 3, 80], 30, replace(MARKED, temperature=0.0)),
        Sequence([2] * 21, 30, replace(MARKED, temperature=0.0)),
    ]
    drawn(texts_, Watermark(0.5, 3.0), chunk=6, depth=3, preempt_every=5)
    for text in texts_:
        known = list(text.prompt)
        for token in text.tokens:
            x_V = torch.from_numpy(logits_after(known))
            x_V += 3.0 * green_tokens(torch.tensor(known[-1:]), VOCAB, 0.5)[0]
            assert token == int(x_V.argmax())
            known.append(token)


def test_prompts_that_are_told_about_do_not_move_the_mark() -> None:
    """Logits are then of more tokens than are drawn."""
    asked = [Sequence([5, 6, 7 + i], 8, replace(MARKED, seed=i)) for i in range(4)]
    told = [replace(one, tokens=[], prompt_logprobs=i % 2 == 0) for i, one in enumerate(asked)]
    drawn(asked)
    drawn(told)
    assert [one.tokens for one in told] == [one.tokens for one in asked]


def test_steps_without_a_watermark_have_none_of_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fake_engine()
    seen: list[SampleRows] = []
    sample = type(engine.sampling).sample

    def spy(self: object, logits_SV: torch.Tensor, rows: SampleRows) -> Samples:
        seen.append(rows)
        return sample(self, logits_SV, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(type(engine.sampling), "sample", spy)
    runner = Runner(engine, preparation(), blocks=64)
    Planner().run(runner.execute, [Sequence([1, 2], 3, Sampling(temperature=1.0))])
    assert seen and all(rows.previous_S is None for rows in seen)
    seen.clear()
    runner = Runner(engine, preparation(), blocks=64)
    Planner().run(runner.execute, [Sequence([1, 2], 3), Sequence([1, 2], 3, MARKED)])
    assert all((rows.previous_S is not None) == has_mark(rows) for rows in seen)
    assert any(has_mark(rows) for rows in seen)


def has_mark(rows: SampleRows) -> bool:
    return bool((rows.features_S & Feature.WATERMARK).any())

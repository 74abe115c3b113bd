"""Slots: what bindings leave behind, and what releases take away."""

import numpy as np
import torch
from fake_model import VOCAB, fake_engine, logits_after, preparation
from planner import Planner, Sequence

from headrace.ops.sampling import IN_PROMPT, Feature
from headrace.runner import Runner
from headrace.slots import features_of
from headrace.wire import Sampling


def run(sequences: list[Sequence], **knobs: int) -> Runner:
    runner = Runner(fake_engine(), preparation(slots_max=16, state_slots_max=16), blocks=512)
    Planner(**knobs).run(runner.execute, sequences)
    return runner


def test_features_are_what_the_parameters_need():
    assert features_of(Sampling()) == Feature(0)
    assert features_of(Sampling(top_k=5)) == Feature(0), "filters do not change the best token"
    sampled = features_of(Sampling(temperature=1, top_p=0.5, min_p=0.1))
    assert sampled == Feature.SAMPLED | Feature.FILTERED | Feature.MIN_P
    assert features_of(Sampling(tokens_min=3)) == Feature(0), "no token ends the sequence"
    assert features_of(Sampling(presence_penalty=0.5)) == Feature.PENALTY
    assert features_of(Sampling(watermark=True)) == Feature.WATERMARK


def test_slots_are_used_again_with_nothing_of_their_last_sequence():
    biased = Sampling(bias_token=(7,), bias=(1e6,), repetition_penalty=1.3)
    first = [Sequence([i + 1, 2], 3, biased) for i in range(8)]
    second = [Sequence([i + 1, 2], 3) for i in range(8)]
    run(first + second, running_max=4)
    assert all(sequence.tokens == [7, 7, 7] for sequence in first)
    for sequence in second:
        known = list(sequence.prompt)
        for token in sequence.tokens:
            assert token == int(logits_after(known).argmax())
            known.append(token)


def test_penalty_state_counts_output_and_marks_the_prompt():
    sampling = Sampling(frequency_penalty=0.1, bias_token=(9,), bias=(1e6,))
    runner = run([Sequence([4, 5, 4], 3, sampling)])
    state = runner.slots.penalties(torch.tensor([0]))[0][0]
    assert state.nonzero()[:, 0].tolist() == [4, 5, 9]
    assert state[[4, 5, 9]].tolist() == [IN_PROMPT, IN_PROMPT, 3]


def test_penalty_state_is_rebuilt_from_history():
    sampling = Sampling(frequency_penalty=0.5, temperature=0.8, seed=3)
    alone, preempted = Sequence([4, 5], 12, sampling), Sequence([4, 5], 12, sampling)
    run([alone])
    run([Sequence([1], 12), preempted], preempt_every=2)
    assert preempted.tokens == alone.tokens
    assert preempted.generation > 1


def test_ending_tokens_wait_for_their_turn():
    ending = Sampling(bias_token=(7,), bias=(1e6,), tokens_min=3, ending_token=(7,))
    sequence = Sequence([1, 2, 3], 5, ending)
    run([sequence], chunk=2)
    assert 7 not in sequence.tokens[:3] and sequence.tokens[3:] == [7, 7]


def test_seeds_keep_all_their_bits():
    big = Sequence([1, 2], 8, Sampling(temperature=2.0, seed=2**64 - 1))
    small = Sequence([1, 2], 8, Sampling(temperature=2.0, seed=2**32 - 1))
    run([big, small])
    assert big.tokens != small.tokens
    assert max(big.tokens + small.tokens) < VOCAB
    assert np.unique(big.tokens).size > 1

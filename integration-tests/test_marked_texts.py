"""Texts that are marked, over the whole server, and the detector that tells them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from headrace.ops.sampling.watermark import is_green, z_score
from stack import FLAGS, Stack

GAMMA = 0.25
TOKENS = 120
# Texts without a mark have more in one of 30,000.
MARKED_MIN = 4.0


@pytest.fixture(scope="module")
def marking(tiny_model: Path) -> Iterator[Stack]:
    flags = ("--watermark-gamma", str(GAMMA))
    with Stack("--model-id", str(tiny_model), *FLAGS, *flags, WATERMARK_DELTA="3") as stack:
        yield stack.wait_ready()


def drawn(stack: Stack, prompt: str = "the quick brown fox", **parameters: object) -> list[dict]:
    """The tokens of an answer."""
    given = {"max_new_tokens": TOKENS, "ignore_eos_token": True, "details": True} | parameters
    answer = stack.ok("/generate", {"inputs": prompt, "parameters": given})
    return answer["details"]["tokens"]


def ids(tokens: list[dict]) -> list[int]:
    return [token["id"] for token in tokens]


def green_share(tokens: list[int], gamma: float) -> float:
    pairs = list(pairwise(tokens))
    return sum(is_green(before, token, gamma) for before, token in pairs) / len(pairs)


def test_green_tokens_dominate_and_the_seed_repeats_them(server: Stack) -> None:
    """By TGI's defaults: half of the vocabulary, and 2."""
    marked = ids(drawn(server, do_sample=True, seed=7, watermark=True))
    plain = ids(drawn(server, do_sample=True, seed=7))
    assert green_share(marked, 0.5) > 0.75
    assert z_score(marked, 0.5) > MARKED_MIN
    assert abs(z_score(plain, 0.5)) < MARKED_MIN
    assert ids(drawn(server, do_sample=True, seed=7, watermark=True)) == marked
    assert ids(drawn(server, do_sample=True, seed=8, watermark=True)) != marked


def test_flag_and_variable_make_the_mark(marking: Stack) -> None:
    marked = ids(drawn(marking, do_sample=True, seed=1, watermark=True))
    plain = ids(drawn(marking, do_sample=True, seed=1))
    # A quarter is green, and weighs e³ times as much: seven of eight tokens of a flat distribution.
    assert green_share(marked, GAMMA) > 0.7
    assert z_score(marked, GAMMA) > 2 * MARKED_MIN
    assert abs(z_score(plain, GAMMA)) < MARKED_MIN


def test_the_first_token_is_marked_by_the_prompt_s_last(server: Stack) -> None:
    prompt = "a lake and a river"
    last = server.ok("/tokenize", {"inputs": prompt})[-1]["id"]
    asked = {"do_sample": True, "max_new_tokens": 1, "watermark": True}
    firsts = [ids(drawn(server, prompt, seed=seed, **asked))[0] for seed in range(40)]
    assert sum(is_green(last, first, 0.5) for first in firsts) > 28


def test_log_probabilities_show_the_mark(server: Stack) -> None:
    """Beside an unmarked answer, all green tokens of a place have gained as much, the others lost
    as much, and both shifts lie 2 apart."""
    prompt = "a lake and a river"
    last = server.ok("/tokenize", {"inputs": prompt})[-1]["id"]
    asked = {"max_new_tokens": 1, "top_n_tokens": 5}
    body = {"inputs": prompt, "parameters": {**asked, "details": True}}
    plain = server.ok("/generate", body)["details"]["top_tokens"][0]
    body["parameters"]["watermark"] = True
    marked = server.ok("/generate", body)["details"]["top_tokens"][0]
    before = {token["id"]: token["logprob"] for token in plain}
    green = [t for t in marked if is_green(last, t["id"], 0.5)]
    assert marked[0] in green
    gains = [t["logprob"] - before[t["id"]] for t in green if t["id"] in before]
    losses = [
        t["logprob"] - before[t["id"]] for t in marked if t not in green and t["id"] in before
    ]
    assert gains
    assert all(0 < gain < 2 for gain in gains)
    assert max(gains) - min(gains) < 1e-3
    assert all(abs(gains[0] - loss - 2) < 1e-3 for loss in losses)


def test_streams_beside_unmarked_ones_have_the_same_tokens(server: Stack) -> None:
    asked = {"do_sample": True, "seed": 3, "max_new_tokens": 30}
    parameters = {**asked, "ignore_eos_token": True, "details": True}

    def streamed(watermark: bool) -> list[int]:
        body = {
            "inputs": "the quick brown fox",
            "parameters": {**parameters, "watermark": watermark},
        }
        return [event["token"]["id"] for event in server.stream("/generate_stream", body)]

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(streamed, [True, False] * 3))
    alone = {mark: ids(drawn(server, watermark=mark, **asked)) for mark in (True, False)}
    assert together == [alone[True], alone[False]] * 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--watermark-gamma", "1"), "--watermark-gamma must lie above 0 and below 1, it is 1"),
        (("--watermark-delta", "nan"), "--watermark-delta must be a finite number, it is NaN"),
    ],
    ids=str,
)
def test_a_mark_that_cannot_be_made_ends_the_start(
    tiny_model: Path, flags: tuple[str, str], sentence: str
) -> None:
    with Stack("--model-id", str(tiny_model), *FLAGS, *flags) as stack:
        assert stack.wait_exit() != 0
        assert sentence in stack.log

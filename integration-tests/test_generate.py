"""TGI's routes over the whole server: shapes, lengths, sampling."""

import pytest

from stack import Stack

PROMPT = "the quick brown fox"
GREEDY = {"max_new_tokens": 12, "ignore_eos": True}


def generate(server: Stack, prompt: str = PROMPT, **parameters: object) -> dict:
    body = {"inputs": prompt, "parameters": {**GREEDY, "details": True, **parameters}}
    return server.ok("/generate", body)


def test_details_count_what_was_generated(server: Stack) -> None:
    answer = generate(server)
    details = answer["details"]
    assert set(answer) == {"generated_text", "details"}
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == 12 == len(details["tokens"])
    assert details["seed"] is None
    assert details["prefill"] == []
    for token in details["tokens"]:
        assert set(token) == {"id", "text", "logprob", "special"}
        assert token["logprob"] <= 0
    plain = "".join(t["text"] for t in details["tokens"] if not t["special"])
    assert answer["generated_text"] == plain


def test_root_answers_an_array_and_prepends_the_prompt(server: Stack) -> None:
    answer = server.ok("/", {"inputs": PROMPT, "parameters": GREEDY})
    assert isinstance(answer, list)
    assert len(answer) == 1
    assert answer[0]["generated_text"].startswith(PROMPT)


def test_stream_has_an_event_a_token_and_ends_with_the_text(server: Stack) -> None:
    whole = generate(server)
    body = {"inputs": PROMPT, "parameters": {**GREEDY, "details": True}}
    events = list(server.stream("/generate_stream", body))
    assert [e["index"] for e in events] == list(range(1, 13))
    assert [e["token"]["id"] for e in events] == [t["id"] for t in whole["details"]["tokens"]]
    assert [e["generated_text"] for e in events[:-1]] == [None] * 11
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"]["generated_tokens"] == 12
    assert events[-1]["details"]["finish_reason"] == "length"
    assert events[-1]["details"]["input_length"] > 0


def test_greedy_answers_repeat_and_do_not_depend_on_the_cache(server: Stack) -> None:
    prompt = "a prompt that is long enough to fill several blocks of the cache, " * 4
    first, second = (generate(server, prompt)["details"]["tokens"] for _ in range(2))
    assert [t["id"] for t in first] == [t["id"] for t in second]


def test_seed_decides_what_is_drawn(server: Stack) -> None:
    def draw(seed: int) -> list[int]:
        answer = generate(server, do_sample=True, seed=seed, temperature=1.5)
        assert answer["details"]["seed"] == seed
        return [t["id"] for t in answer["details"]["tokens"]]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_stop_string_ends_the_text_and_stays_in_it(server: Stack) -> None:
    text = generate(server)["generated_text"]
    stop = text[3:6]
    answer = generate(server, stop=[stop])
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["generated_text"].endswith(stop)
    assert text.startswith(answer["generated_text"])


def test_truncate_keeps_the_last_tokens(server: Stack) -> None:
    long = "one two three four five six seven eight nine ten"
    ids = [t["id"] for t in server.ok("/tokenize", {"inputs": long})]
    answer = generate(server, long, truncate=4)
    kept = list(
        server.stream(
            "/generate_stream",
            {"inputs": long, "parameters": {**GREEDY, "details": True, "truncate": 4}},
        )
    )
    assert len(ids) > 4
    assert kept[-1]["details"]["input_length"] == 4
    assert [e["token"]["id"] for e in kept] == [t["id"] for t in answer["details"]["tokens"]]


def test_top_tokens_come_best_first(server: Stack) -> None:
    details = generate(server, top_n_tokens=3)["details"]
    for chosen, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) >= 3
        logprobs = [t["logprob"] for t in top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert top[0]["id"] == chosen["id"]


def test_best_of_reports_the_losers(server: Stack) -> None:
    answer = generate(server, best_of=2, do_sample=True, temperature=1.2)
    assert len(answer["details"]["best_of_sequences"]) == 1


def test_tokenize_gives_text_and_offsets(server: Stack) -> None:
    text = "héllo wörld"
    tokens = server.ok("/tokenize", {"inputs": text})
    assert all(set(t) == {"id", "text", "start", "stop"} for t in tokens)
    assert "".join(t["text"] for t in tokens if t["stop"] > t["start"])


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.8}, {"frequency_penalty": 1.5}])
def test_penalties_change_the_answer(server: Stack, penalty: dict[str, float]) -> None:
    prompt = "again and again and again and again"
    plain = generate(server, prompt, max_new_tokens=40)["details"]["tokens"]
    changed = generate(server, prompt, max_new_tokens=40, **penalty)["details"]["tokens"]
    assert [t["id"] for t in plain] != [t["id"] for t in changed]


def test_info_reports_the_limits(server: Stack) -> None:
    status, text = server.get("/info")
    assert status == 200
    for name in ("model_id", "max_input_tokens", "max_total_tokens", "max_concurrent_requests"):
        assert f'"{name}"' in text

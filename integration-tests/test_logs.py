"""What a server writes: a line for each request as TGI has it, and never a prompt or a secret."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stack import FLAGS, Stack

KEY = "sesame-of-the-cave"
TOKEN = "hf_sEcReTtOkEn"
PROMPT = "hippopotamus"
STOP = "rhinoceros"
SECRETS = {"API_KEY": KEY, "HF_TOKEN": TOKEN}
# The fields of TGI's line, in its order.
FIELDS = "parameters total_time validation_time queue_time inference_time time_per_token seed"
DURATION = r"\d+(\.\d+)?(ns|µs|ms|s)"
PARAMETERS = (
    "GenerateParameters { best_of: None, temperature: Some(0.5), repetition_penalty: None, "
    "frequency_penalty: None, top_k: None, top_p: None, typical_p: None, do_sample: false, "
    "max_new_tokens: Some(3), stop: [1 texts], truncate: None, watermark: false, "
    "decoder_input_details: false, seed: Some(7), top_n_tokens: None, grammar: false }"
)


def exercise(stack: Stack) -> None:
    """Good answers, whole and streamed, of one sequence and of several; refusals of all kinds."""
    parameters = {"temperature": 0.5, "max_new_tokens": 3, "seed": 7, "stop": [STOP]}
    messages = [{"role": "user", "content": PROMPT}]
    chat = {"messages": messages, "max_tokens": 3, "n": 2, "temperature": 1}
    for path, body, key, status in (
        ("/generate", {"inputs": PROMPT, "parameters": parameters}, KEY, 200),
        ("/generate_stream", {"inputs": PROMPT, "parameters": parameters}, KEY, 200),
        ("/v1/chat/completions", chat, KEY, 200),
        ("/v1/completions", {"prompt": [PROMPT, PROMPT], "max_tokens": 3}, KEY, 200),
        ("/generate", {"inputs": PROMPT * 999, "parameters": {}}, KEY, 422),
        ("/generate", {"inputs": [PROMPT], "parameters": KEY}, KEY, 422),
        ("/generate", {"inputs": PROMPT}, f"{KEY}!", 401),
    ):
        assert post(stack, path, body, key) == status, path


def post(stack: Stack, path: str, body: Any, key: str) -> int:
    connection = stack.connect()
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        reply.read()
        return reply.status
    finally:
        connection.close()


class Log:
    """What a server wrote until it had ended."""

    def __init__(self, model: Path, *flags: str, **environment: str) -> None:
        stack = Stack("--model-id", str(model), *FLAGS, *flags, **environment, **SECRETS)
        with stack:
            stack.wait_ready()
            exercise(stack)
            stack.process.terminate()
            assert stack.wait_exit() == 0
            self.text = stack.log

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@pytest.fixture(scope="module")
def text(tiny_model: Path) -> Log:
    return Log(tiny_model)


@pytest.fixture(scope="module")
def objects(tiny_model: Path) -> Log:
    return Log(tiny_model, "--json-output", LOG_LEVEL="trace")


def test_each_request_that_ends_well_has_one_line_with_tgi_s_fields(text: Log) -> None:
    lines = [line for line in text.lines if "Success" in line]
    assert len(lines) == 4, "\n".join(lines)
    for line in lines:
        assert " INFO " in line
        at = [line.index(f" {field}=") for field in FIELDS.split()]
        assert at == sorted(at)
        for field in FIELDS.split()[1:-1]:
            assert re.search(rf' {field}="{DURATION}"', line), (field, line)
    assert f"parameters={PARAMETERS}" in lines[0]
    assert 'seed="Some(7)"' in lines[0]
    # Tokens of a request's sequences, all together.
    counts = [re.search(r"generated_tokens=(\d+)", line) for line in lines]
    assert [count and int(count[1]) for count in counts] == [3, 3, 6, 6]


def test_the_same_as_json(objects: Log) -> None:
    lines = [json.loads(line) for line in objects.lines if line.startswith("{")]
    lines = [line for line in lines if line.get("message") == "Success"]
    assert len(lines) == 4
    for line in lines:
        assert line["level"] == "INFO" and line["timestamp"] and line["target"]
        for field in FIELDS.split()[1:-1]:
            assert re.fullmatch(DURATION, line[field]), (field, line)
    assert lines[0]["parameters"] == PARAMETERS
    assert (lines[0]["seed"], lines[0]["input_tokens"] > 0) == ("Some(7)", True)
    assert {line["span"]["path"] for line in lines} == {
        "/generate",
        "/generate_stream",
        "/v1/chat/completions",
        "/v1/completions",
    }


def test_every_line_of_json_output_is_an_object_with_a_level(objects: Log) -> None:
    lines = [json.loads(line) for line in objects.lines]
    assert all(line["level"] and line["timestamp"] for line in lines)
    assert {"INFO", "DEBUG"} <= {line["level"] for line in lines}


@pytest.mark.parametrize("which", ["text", "objects"])
def test_no_prompt_and_no_secret_is_in_the_log_at_any_level(
    which: str, request: pytest.FixtureRequest
) -> None:
    log: Log = request.getfixturevalue(which)
    for secret in (KEY, TOKEN, PROMPT, STOP):
        assert secret not in log.text
    # The arguments are there all the same.
    assert "Arguments: Serve {" in log.text and "(hidden)" in log.text


def test_phases_of_the_start_are_told_with_their_seconds(text: Log) -> None:
    told = dict(re.findall(r"shard 0: (\w[\w ]*?) +(\d+\.\d+) s", text.text))
    for phase in ("imports", "model", "weights", "kv pool", "warm up", "total"):
        assert phase in told, text.text
    assert float(told["total"]) > 0


def test_levels_filter_what_is_written(tiny_model: Path, objects: Log) -> None:
    quiet = Log(tiny_model, LOG_LEVEL="error")
    assert "Success" not in quiet.text and " INFO " not in quiet.text
    assert "Arguments" not in quiet.text
    assert '"DEBUG"' in objects.text

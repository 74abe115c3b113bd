"""The metrics of a server that has served: TGI's series, ours, and the port of their own."""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.testing.tiny import Tiny
from stack import Stack, free_port

# TGI's series: name, type, labels with their values.
TGI = """
tgi_request_count counter
tgi_request_success counter
tgi_request_failure counter err=validation
tgi_request_duration histogram
tgi_request_validation_duration histogram
tgi_request_queue_duration histogram
tgi_request_inference_duration histogram
tgi_request_mean_time_per_token_duration histogram
tgi_request_generated_tokens histogram
tgi_request_input_length histogram
tgi_request_max_new_tokens histogram
tgi_request_skipped_tokens histogram
tgi_queue_size gauge
tgi_batch_current_size gauge
tgi_batch_current_max_tokens gauge
tgi_batch_max_total_tokens gauge
tgi_batch_next_size histogram
tgi_batch_inference_count counter method=prefill
tgi_batch_inference_count counter method=decode
tgi_batch_inference_success counter method=prefill
tgi_batch_inference_success counter method=decode
tgi_batch_inference_failure counter method=decode
tgi_batch_inference_duration histogram method=prefill
tgi_batch_inference_duration histogram method=decode
tgi_batch_forward_duration histogram method=prefill
tgi_batch_forward_duration histogram method=decode
tgi_batch_decode_duration histogram method=prefill
tgi_batch_decode_duration histogram method=decode
tgi_batch_filter_duration histogram method=prefill
tgi_batch_filter_duration histogram method=decode
tgi_batch_concat_duration histogram method=decode
tgi_batch_concat counter reason=chunking
tgi_batch_concat counter reason=backpressure
tgi_batch_concat counter reason=wait_exceeded
"""

# Of each histogram, and of these counters and gauges, something was observed.
GREW = (
    *("tgi_request_count", "tgi_request_success", "tgi_request_failure"),
    *("tgi_batch_inference_success", "tgi_batch_max_total_tokens", "headrace_prefix_hits"),
    *("headrace_prefix_lookups", "headrace_kv_blocks", "headrace_cached_tokens", "headrace_steps"),
    *("headrace_build_info", "headrace_device_memory_bytes", "process_resident_memory_bytes"),
    "headrace_requests_rejected",
)
OURS = (
    *("headrace_inter_token_duration_count", 'headrace_queue_wait_duration_count{reason="none"}'),
    *('headrace_step_duration_count{kind="prefill"}', "headrace_step_fill_ratio_count"),
    *('headrace_step_duration_count{kind="decode"}', "headrace_groups_lost"),
    *("headrace_kv_blocks_used", "headrace_kv_blocks_free", "headrace_preemptions"),
)
LINE = re.compile(r"^([a-z_]+)(\{[^}]*\})? (\S+)$")


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[Stack]:
    model: Path = tmp_path_factory.mktemp("model")
    Tiny().write(model)
    flags = ("--model-id", str(model), "--device", "cpu", "--threads", "1")
    flags += ("--kv-memory", "16000000", "--prometheus-port", str(port))
    with Stack(*flags) as stack:
        stack.wait_ready()
        prompt = {"inputs": "The quick brown fox " * 12, "parameters": {"max_new_tokens": 8}}
        for _ in range(2):  # The second finds the first one's blocks.
            stack.ok("/generate", prompt)
        assert stack.post("/generate", {"inputs": ""})[0] == 422
        yield stack


def values(text: str) -> dict[str, float]:
    found = (LINE.match(line) for line in text.splitlines())
    return {m[1] + (m[2] or ""): float(m[3]) for m in found if m}


@pytest.mark.parametrize("line", TGI.split("\n")[1:-1])
def test_every_series_of_tgi_is_there_with_its_type_and_labels(served: Stack, line: str) -> None:
    name, kind, *labels = line.split()
    text = served.get("/metrics")[1]
    assert f"# TYPE {name} {kind}\n" in text
    assert f"# HELP {name} " in text
    key, value = labels[0].split("=") if labels else ("", "")
    label = f'{{{key}="{value}"}}' if labels else ""
    suffix = "_count" if kind == "histogram" else ""
    assert f"{name}{suffix}{label}" in values(text)
    if kind == "histogram" and name != "tgi_batch_concat_duration":
        assert values(text)[f"{name}{suffix}{label}"] > 0


def test_what_happened_is_in_them(served: Stack) -> None:
    found = values(served.get("/metrics")[1])
    for name in GREW:
        assert any(v > 0 for key, v in found.items() if key.split("{")[0] == name), name
    for series in OURS:
        assert series in found
    assert found['tgi_batch_concat_duration_count{method="decode"}'] == 2
    assert found["tgi_request_count"] == 3
    assert found['headrace_requests_rejected{reason="validation"}'] == 1
    # A stream's first token ends no gap.
    assert found["headrace_inter_token_duration_count"] == 14


def test_their_own_port_serves_the_same_names(served: Stack, port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        own = values(answer.read().decode())
    assert own.keys() == values(served.get("/metrics")[1]).keys()

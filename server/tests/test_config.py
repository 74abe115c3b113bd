"""serve.json is read strictly: every wrong key is named."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from headrace.config import Serve, Tls
from headrace.errors import ConfigError


def shard(rank: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "socket": f"/run/shard-{rank}",
        "device_index": rank,
        "rendezvous": "127.0.0.1:29500",
    }


def example() -> dict[str, Any]:
    return {
        "model": {
            "id": "some/model",
            "revision": None,
            "sha": None,
            "path": "/models/some",
            "load_format": "auto",
            "quantize": "",
            "tokenizer_config_path": None,
            "quantize_activations": False,
            "tool_call_parser": "auto",
        },
        "device": {
            "kind": "auto",
            "dtype": "auto",
            "kv_dtype": "",
            "memory_fraction": 0,
            "kv_bytes_max": 0,
            "threads": 0,
            "reference_ops": False,
            "graphs": True,
        },
        "requests": {
            "max_concurrent_requests": 128,
            "max_best_of": 2,
            "max_stop_sequences": 4,
            "max_top_n_tokens": 5,
            "max_input_tokens": None,
            "max_total_tokens": 4096,
            "max_client_batch_size": 4,
            "payload_limit": 2000000,
            "validation_workers": 2,
            "disable_grammar_support": False,
            "timeout_ms": None,
        },
        "engine": {
            "block_tokens": 0,
            "blocks_max": 0,
            "running_max": 128,
            "step_tokens_max": 2048,
            "prefill_tokens_max": 2048,
            "itl_target_ms": 50,
            "pipeline_depth": 2,
            "prefix_caching": True,
            "record": "/tmp/run.plans",
            "mask_ms_max": 20,
            "step_deadline_ms": 60000,
            "prepare_deadline_ms": 600000,
        },
        "watermark": {"gamma": 0.25, "delta": -2},
        "http": {
            "hostname": "127.0.0.1",
            "port": 3000,
            "api_key": None,
            "cors_allow_origin": [],
            "compute_type": None,
            "predict_route": None,
            "prometheus_port": None,
            "health_route": None,
            "v1_dialect": "openai",
            "drain_deadline_ms": 30000,
        },
        "shards": [shard(0), shard(1)],
        "telemetry": {
            "log_level": "info",
            "json_output": False,
            "otlp_endpoint": None,
            "otlp_service_name": "headrace",
            "traces": {
                "protocol": "grpc",
                "tls": {"roots": "/some/ca.pem", "client": None},
                "headers": [{"name": "key", "value": "sesame"}],
                "resource": [],
                "sampler": "always_on",
                "sampler_ratio": 1.0,
                "timeout_ms": 1000,
                "queue_max": 100,
                "batch_max": 10,
                "delay_ms": 10,
            },
        },
    }


def test_a_whole_file_is_read(tmp_path: Path):
    path = tmp_path / "serve.json"
    path.write_text(json.dumps(example()))
    serve = Serve.load(path)
    assert serve.model.path == Path("/models/some")
    assert serve.engine.record == Path("/tmp/run.plans")
    assert serve.requests.max_input_tokens is None and serve.requests.max_total_tokens == 4096
    assert serve.device.memory_fraction == 0.0 and isinstance(serve.device.memory_fraction, float)
    assert (serve.watermark.gamma, serve.watermark.delta) == (0.25, -2.0)
    assert [entry.rank for entry in serve.shards] == [0, 1]
    assert serve.shard(1).device_index == 1
    assert serve.telemetry.traces.tls == Tls(Path("/some/ca.pem"), None)


def test_absent_options_are_none():
    data = example()
    del data["model"]["sha"], data["telemetry"]["otlp_endpoint"]
    assert Serve.parse(data).model.sha is None


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("engine", "speed"), 1, "serve.json: engine has unknown keys: speed"),
        (("extra",), 1, "serve.json has unknown keys: extra"),
        (("http", "port"), "3000", "serve.json: http: port must be int, not str"),
        (("http", "port"), True, "port must be int, not bool"),
        (("http", "port"), -1, "port must not be negative"),
        (("model",), [], "serve.json: model must be an object, not list"),
        (("model", "id"), None, "model: id must be str, not null"),
        (("shards",), {}, "shards must be a list, not dict"),
        (("shards",), [], "rank order from 0"),
        (("shards",), [shard(1), shard(0)], "rank order from 0"),
        (("shards", 1, "sokcet"), "x", r"shards\[1\] has unknown keys: sokcet"),
        (("device", "reference_ops"), 0, "reference_ops must be bool, not int"),
    ],
)
def test_wrong_keys_are_named(path: tuple[Any, ...], value: Any, sentence: str):
    data = copy.deepcopy(example())
    at: Any = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(ConfigError, match=sentence):
        Serve.parse(data)


def test_missing_keys_are_named():
    data = example()
    del data["engine"]["running_max"]
    with pytest.raises(ConfigError, match=r"serve.json: engine lacks `running_max`"):
        Serve.parse(data)


def test_a_missing_file_is_one_sentence(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.json: No such file"):
        Serve.load(tmp_path / "nowhere.json")


def test_ranks_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match="rank 2 is not one of the 2 shards"):
        Serve.parse(example()).shard(2)

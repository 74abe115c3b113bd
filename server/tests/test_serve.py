"""A shard as the launcher and the router see it: a process, its control lines and its socket."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from planner import Planner, Sequence
from test_config import example, shard

from headrace.testing.tiny import Tiny
from headrace.wire import SERVICE, Plan, Result, decode_result, encode_plan, messages

WAIT_S = 60


class Process:
    """`python -m headrace shard`, with a lifeline that the test holds."""

    def __init__(self, folder: Path, tmp_path: Path, **device: Any) -> None:
        data = example()
        data["model"]["path"] = str(folder)
        data["device"] |= {"kind": "cpu", "dtype": "float32", "threads": 1} | device
        self.socket = tmp_path / "0.sock"
        data["shards"] = [shard(0) | {"socket": str(self.socket)}]
        config = tmp_path / "serve.json"
        config.write_text(json.dumps(data))
        self.child = subprocess.Popen(
            [sys.executable, "-m", "headrace", "shard", "--config", str(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )

    def line(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        return json.loads(self.child.stdout.readline())

    def end(self) -> int:
        """Cuts the lifeline; returns the exit status."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.close()
        status = self.child.wait(WAIT_S)
        self.child.stdout.close()
        return status


class Client:
    """What the router does with a shard."""

    def __init__(self, socket: Path) -> None:
        self.kinds = messages()
        self.channel = grpc.insecure_channel(f"unix:{socket}")

    def call(self, method: str, **fields: Any) -> Any:
        request = getattr(self.kinds, f"{method}Request")(**fields)
        reply = getattr(self.kinds, f"{method}Reply")
        call = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=reply.FromString,
        )
        return call(request, timeout=WAIT_S, wait_for_ready=True)

    def prepare(self, **fields: Any) -> Any:
        wanted = {
            "block_tokens": 4,
            "slots_max": 16,
            "state_slots_max": 4,
            "step_tokens_max": 64,
            "step_rows_max": 8,
            "blocks_max": 128,
        }
        return self.call("Prepare", **(wanted | fields))

    def execute(self) -> tuple[queue.Queue[bytes | None], Iterator[bytes]]:
        plans: queue.Queue[bytes | None] = queue.Queue()
        call = self.channel.stream_stream(f"/{SERVICE}/Execute")
        return plans, call(iter(plans.get, None), timeout=WAIT_S)


def run(client: Client) -> list[list[int]]:
    """Serves some requests through a stream of its own."""
    plans, results = client.execute()

    def execute(plan: Plan) -> Result:
        plans.put(encode_plan(plan))
        return decode_result(next(results))

    sequences = [Sequence([i + 5, 7, 9], 6) for i in range(5)]
    Planner(blocks=128, running_max=4).run(execute, sequences)
    plans.put(None)
    assert list(results) == []
    return [sequence.tokens for sequence in sequences]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny(layers=1).write(tmp_path_factory.mktemp("llama"))


@pytest.mark.timeout(120)
def test_a_shard_serves_until_its_lifeline_is_cut(folder: Path, tmp_path: Path):
    process = Process(folder, tmp_path)
    try:
        assert process.line() == {"event": "serving"}
        client = Client(process.socket)
        facts = client.call("Describe")
        assert (facts.architecture, facts.device, facts.dtype) == (
            "LlamaForCausalLM",
            "cpu",
            "float32",
        )
        assert (facts.rank, facts.ranks, facts.vocab_size) == (0, 1, 509)
        assert facts.kv_bytes_per_token == 2 * 1 * 2 * 16 * 4
        assert facts.block_tokens_supported[0] == 16

        prepared = client.prepare()
        assert prepared.blocks == 128
        items = {item.what: item.bytes for item in prepared.memory}
        assert items["weights"] > 0 and items["penalty state"] > 0
        assert items["kv pool"] == 128 * 4 * facts.kv_bytes_per_token
        tokens = run(client)
        assert all(len(drawn) == 6 for drawn in tokens)

        # A wrong plan ends the stream with one sentence, and nothing else.
        plans, results = client.execute()
        plans.put(b"\xff")
        with pytest.raises(grpc.RpcError) as caught:
            next(results)
        plans.put(None)
        assert caught.value.code() == grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
        assert "not a ToShard message" in caught.value.details()  # type: ignore[attr-defined]

        # Prepared again, it serves again.
        assert client.prepare().blocks == 128
        assert run(client) == tokens
        with pytest.raises(grpc.RpcError) as caught:
            client.prepare(kv_dtype="float8_e4m3fn")
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION  # type: ignore[attr-defined]
        assert "loaded for a KV pool of torch.float32" in caught.value.details()  # type: ignore[attr-defined]
        client.channel.close()
        assert process.end() == 0
    finally:
        process.child.kill()


@pytest.mark.timeout(120)
def test_a_shard_that_cannot_start_says_why(tmp_path: Path):
    process = Process(tmp_path, tmp_path)
    try:
        line = process.line()
        assert line["event"] == "fatal" and "config.json" in line["message"]
        assert process.child.wait(WAIT_S) == 1
        process.end()
    finally:
        process.child.kill()

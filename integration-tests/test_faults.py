"""Processes that die, clients that leave, signals under load."""

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

from stack import FLAGS, HEADRACE, Stack, alive

LONG = {"inputs": "a long story", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}


def wait_until(condition: object, seconds: float = 20.0) -> None:
    """Polls until `condition()` holds."""
    give_up = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up, "the condition never held"
        time.sleep(0.02)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_health_is_503_while_loading(tiny_model: Path) -> None:
    with Stack("--model-id", str(tiny_model), *FLAGS) as stack:
        statuses: list[int] = []

        def ready() -> bool:
            try:
                statuses.append(stack.get("/health")[0])
            except OSError:
                return False
            return statuses[-1] == 200

        wait_until(ready, 120)
        assert set(statuses) == {200, 503}


def test_disconnect_frees_what_the_request_held(server: Stack) -> None:
    wait_until(lambda: server.metric("tgi_batch_current_size") == 0)
    dropped = server.metric("tgi_request_failure", err="dropped")
    body = b'{"inputs": "gone", "parameters": {"max_new_tokens": 480, "ignore_eos": true}}'
    with socket.create_connection(("127.0.0.1", server.port)) as s:
        s.sendall(
            b"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        s.recv(200)
        wait_until(lambda: server.metric("tgi_batch_current_size") >= 1)
    wait_until(lambda: server.metric("tgi_batch_current_size") == 0)
    # It was given up, and did not just come to its own end.
    assert server.metric("tgi_request_failure", err="dropped") == dropped + 1


def test_dead_shard_ends_the_server_with_its_reason(tiny_model: Path) -> None:
    with Stack("--model-id", str(tiny_model), *FLAGS) as stack:
        stack.wait_ready()
        children = stack.children()
        shard = next(p for p in children if "shard" in command_line(p))
        os.kill(shard, signal.SIGKILL)
        assert stack.wait_exit() == 1
        assert "ShardFailed" in stack.log
        assert not any(alive(p) for p in children)


def test_killed_launcher_leaves_no_orphans(tiny_model: Path) -> None:
    with Stack("--model-id", str(tiny_model), *FLAGS) as stack:
        stack.wait_ready()
        children = stack.children()
        assert len(children) >= 2
        stack.process.kill()
        wait_until(lambda: not any(alive(p) for p in children))


def test_sigterm_finishes_the_streams_that_run(tiny_model: Path) -> None:
    with Stack("--model-id", str(tiny_model), *FLAGS) as stack:
        stack.wait_ready()
        ends: list[dict] = []

        def client() -> None:
            ends.append(list(stack.stream("/generate_stream", LONG))[-1])

        clients = [threading.Thread(target=client) for _ in range(4)]
        for thread in clients:
            thread.start()
        wait_until(lambda: stack.metric("tgi_batch_current_size") == 4)
        stack.process.send_signal(signal.SIGTERM)
        for thread in clients:
            thread.join(60)
        assert stack.wait_exit() == 0
        assert [e["token"] is not None and e["generated_text"] is not None for e in ends] == [
            True
        ] * 4


def test_missing_model_is_one_clear_line() -> None:
    with Stack("--model-id", "/nowhere/at/all") as stack:
        assert stack.wait_exit() == 1
        assert "The folder `/nowhere/at/all` does not exist." in stack.log
        assert "Traceback" not in stack.log


def test_too_many_shards_are_refused_with_the_numbers(tiny_model: Path) -> None:
    with Stack("--model-id", str(tiny_model), "--num-shard", "3", *FLAGS) as stack:
        assert stack.wait_exit() == 1
        assert "8 attention heads cannot be divided evenly over 3 shards" in stack.log


def test_two_shards_answer_like_one(tiny_model: Path, server: Stack) -> None:
    body = {"inputs": "the same", "parameters": {"max_new_tokens": 24, "details": True}}
    expected = [t["id"] for t in server.ok("/generate", body)["details"]["tokens"]]
    with Stack("--model-id", str(tiny_model), "--num-shard", "2", *FLAGS) as stack:
        stack.wait_ready()
        found = [t["id"] for t in stack.ok("/generate", body)["details"]["tokens"]]
    assert found == expected


def test_recorded_plans_replay_to_the_same_tokens(tiny_model: Path, tmp_path: Path) -> None:
    plans = tmp_path / "run.plans"
    with Stack("--model-id", str(tiny_model), "--record-plans", str(plans), *FLAGS) as stack:
        stack.wait_ready()
        for prompt in ("one", "two", "three"):
            parameters = {"max_new_tokens": 8, "ignore_eos": True}
            stack.ok("/generate", {"inputs": prompt, "parameters": parameters})
    done = subprocess.run(
        [str(HEADRACE), "replay", str(plans)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tokens     24, 0 of them differ" in done.stdout

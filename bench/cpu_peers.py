#!/usr/bin/env python3
"""Headrace beside other CPU servers on one machine, in turn, under the same load.

    bench/cpu_peers.py --model MODEL_DIR --llama OUT_DIR --vllm VENV --transformers VENV --repeat 3

Each server is started alone, loaded by bench/load.py at 1, 8 and 32 streams (128 unique prompt
tokens, 64 output tokens, greedy, streaming) and stopped before the next begins. `--rounds` repeats
the whole tour, so that a noisy minute does not fall on one server alone. Prints a table and JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PORT = 8099
READY_SECONDS_MAX = 300.0


@dataclass(frozen=True)
class Peer:
    """A server: how it starts, where it says that it is ready, how it is loaded."""

    name: str
    argv: list[str]
    ready: str = "/health"
    api: str = "completions"
    model: str = "tgi"
    env: dict[str, str] = field(default_factory=dict)
    load_flags: tuple[str, ...] = ()


def peers(args: argparse.Namespace) -> list[Peer]:
    """The servers that were named, ours first."""
    model, port = str(args.model), str(PORT)
    host = ["--host", "127.0.0.1", "--port", port]
    ours = [str(args.headrace), "--model-id", model, "--hostname", "127.0.0.1", "--port", port]
    found = [Peer("headrace", [*ours, *args.flags.split()])]
    if args.llama:
        binary = args.llama / "llama-server"
        common = ["-t", str(os.cpu_count()), "-np", "32", "-c", "16384", *host]
        for dtype in args.llama_types:
            gguf = args.llama / f"{dtype}.gguf"
            found.append(Peer(f"llama.cpp {dtype}", [str(binary), "-m", str(gguf), *common]))
    if args.vllm:
        cores = f"0-{(os.cpu_count() or 1) - 1}"
        env = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_NO_USAGE_STATS": "1",
        }
        argv = [str(args.vllm / "bin" / "vllm"), "serve", model, *host, "--dtype", "bfloat16"]
        argv += ["--max-model-len", "2048", "--served-model-name", "tgi"]
        found.append(Peer("vLLM CPU bf16", argv, env=env))
    if args.transformers:
        argv = [str(args.transformers / "bin" / "transformers"), "serve", model, *host]
        argv += ["--device", "cpu", "--dtype", "bfloat16", "--continuous-batching"]
        argv += ["--cb-num-blocks", "512", "--cb-block-size", "32", "--cb-max-batch-tokens", "1024"]
        found.append(
            Peer(
                "transformers CB bf16",
                argv,
                api="chat",
                model=model,
                load_flags=("--no-ignore-eos",),
            )
        )
    return found


@contextmanager
def running(peer: Peer) -> Iterator[float]:
    """Starts a server, yields the seconds until it was ready, and stops all its processes."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False) as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            peer.argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | peer.env,
        )
        try:
            wait_ready(peer, process, log.name)
            yield time.perf_counter() - started
        finally:
            for signum in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, signum)
                    process.wait(15)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue


def wait_ready(peer: Peer, process: subprocess.Popen[bytes], log: str) -> None:
    give_up = time.monotonic() + READY_SECONDS_MAX
    while time.monotonic() < give_up and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{peer.ready}", timeout=2) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{peer.name} did not become ready; the end of {log}:\n{tail(log)}")


def tail(path: str) -> str:
    return "\n".join(Path(path).read_text(errors="replace").splitlines()[-15:])


def load(peer: Peer, args: argparse.Namespace) -> dict[str, Any]:
    """One pass of bench/load.py; its JSON."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        argv = [sys.executable, str(ROOT / "bench" / "load.py"), "--tokenizer", str(args.model)]
        argv += ["--url", f"http://127.0.0.1:{PORT}", "--api", peer.api, "--model", peer.model]
        argv += ["--label", peer.name, "--json", out.name, "--repeat", str(args.repeat)]
        argv += ["-c", *map(str, args.concurrency), *peer.load_flags]
        subprocess.run(argv, check=False, stdout=subprocess.DEVNULL)
        return json.loads(Path(out.name).read_text())


def summary(results: dict[str, list[dict[str, Any]]], levels: list[int]) -> str:
    """Median tokens a second of each server at each level, and its ratio to the first."""
    rows = [
        "| server | " + " | ".join(f"{c} streams" for c in levels) + " | TTFT p50 at last | ready |"
    ]
    rows.append("|---" * (len(levels) + 3) + "|")
    base: list[float] = []
    for name, rounds in results.items():
        speed = [
            median(r["levels"][i]["output_tokens_per_s"] for r in rounds)
            for i in range(len(levels))
        ]
        base = base or speed
        cells = [f"{s:.0f} ({b / s:.2f})" if s else "-" for s, b in zip(speed, base, strict=True)]
        first = [r["levels"][-1]["ttft_ms"]["p50"] for r in rounds]
        ttft = f"{median(t for t in first if t):.0f} ms" if any(first) else "-"
        ready = f"{median(r['ready_s'] for r in rounds):.1f} s"
        rows.append(f"| {name} | " + " | ".join([*cells, ttft, ready]) + " |")
    rows.append("\ntok/s (the first server's ÷ this one's)")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a Hub-layout folder of SmolLM2-135M-Instruct")
    add("--headrace", type=Path, default=ROOT / ".venv" / "bin" / "headrace")
    add("--flags", default="", help="further flags of headrace")
    add("--llama", type=Path, help="what bench/peers/llama_cpp.sh made")
    add("--llama-types", nargs="+", default=["bf16"], help="GGUF files of --llama")
    add("--vllm", type=Path, help="an environment with vLLM's CPU build")
    add("--transformers", type=Path, help="an environment with transformers[serving]")
    add("-c", "--concurrency", type=int, nargs="+", default=[1, 8, 32])
    add("--repeat", type=int, default=1, help="runs a level; the median counts")
    add("--rounds", type=int, default=1, help="tours of all servers")
    add("--json", dest="json_path", default="")
    args = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for peer in peers(args):
            try:
                with running(peer) as ready_s:
                    results.setdefault(peer.name, []).append(
                        load(peer, args) | {"ready_s": ready_s}
                    )
            except RuntimeError as error:
                print(error, file=sys.stderr)
    facts = next(iter(results.values()))[0]
    print(f"{facts['cpu']} ({facts['flags']}), {os.cpu_count()} cores, commit {facts['commit']}\n")
    print(summary(results, args.concurrency))
    if args.json_path:
        Path(args.json_path).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

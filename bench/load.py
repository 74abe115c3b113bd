#!/usr/bin/env python3
"""A load generator for streaming LLM servers: closed and open loop, TGI and OpenAI routes.

    bench/load.py --url http://127.0.0.1:3000 --tokenizer MODEL_DIR -c 1 8 32
    bench/load.py --url ... --rate 4 --duration 30 --api tgi --json out.json

Closed loop (`-c`): so many clients, each with one request at a time. Open loop (`--rate`): requests
arrive by a Poisson process whatever the server does, so that queueing shows.

Prompts have an exact number of tokens and begin differently, so that no server answers from its
prefix cache. Output tokens are the server's own count (`usage` or `generated_tokens`); a chunk may
carry several. Time to first token (TTFT) is from sending to the first text; inter-token latency
(ITL) is the gap between chunks of text. Loopback only.
"""

import argparse
import asyncio
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = (
    "amber birch cedar delta ember fjord grove harbor island jetty kettle lantern meadow needle "
    "orchard pebble quarry ridge saddle timber upland valley willow yonder zephyr"
).split()
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass
class Measures:
    """What the requests of one level saw. Times in seconds."""

    tokens: int = 0
    chunks: int = 0
    prompt_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def make_prompts(count: int, tokens: int, tokenizer: str, seed: int) -> list[str]:
    """Texts of exactly `tokens` tokens where the tokenizer allows, each with its own beginning."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        words = " ".join(rng.choice(WORDS) for _ in range(2 * tokens))
        ids = encoder.encode(words, add_special_tokens=False).ids[:tokens]
        texts.append(encoder.decode(ids))
    return texts


def body(args: argparse.Namespace, prompt: str) -> tuple[str, dict[str, Any]]:
    """Route and JSON of one request."""
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": args.tokens, "stream": True}
    greedy |= {"model": args.model, "stream_options": {"include_usage": True}}
    greedy |= {} if args.no_ignore_eos else {"ignore_eos": True}
    match args.api:
        case "tgi":
            parameters = {"max_new_tokens": args.tokens, "do_sample": False, "details": True}
            parameters["ignore_eos"] = True
            return "/generate_stream", {"inputs": prompt, "parameters": parameters}
        case "chat":
            messages = [{"role": "user", "content": prompt}]
            return "/v1/chat/completions", greedy | {"messages": messages} | args.extra
        case _:
            return "/v1/completions", greedy | {"prompt": prompt} | args.extra


def text_and_count(api: str, event: dict[str, Any]) -> tuple[str, int, int]:
    """Text of a streamed event, and the server's counts of output and prompt tokens if it says."""
    if api == "tgi":
        details = event.get("details") or {}
        text = (event.get("token") or {}).get("text") or ""
        return text, details.get("generated_tokens") or 0, details.get("input_length") or 0
    usage = event.get("usage") or {}
    choice = (event.get("choices") or [{}])[0]
    text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
    return text, usage.get("completion_tokens") or 0, usage.get("prompt_tokens") or 0


async def events(reader: asyncio.StreamReader, on_event: Callable[[bytes], None]) -> None:
    """Feeds the payload of each `data:` line of a response body, chunked or until it closes."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = head.split(" ", 2)[1]
    chunked = "transfer-encoding: chunked" in head.lower()
    rest = b""
    while True:
        if chunked:
            size = int((await reader.readline()).split(b";")[0] or b"0", 16)
            piece = (await reader.readexactly(size + 2))[:-2] if size else b""
        else:
            piece = await reader.read(1 << 16)
        if not piece:
            break
        rest += piece
        if status != "200":
            continue
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                on_event(line[5:].strip())
    if status != "200":
        raise RuntimeError(f"{status}: {rest[:200].decode(errors='replace')}")


async def one(args: argparse.Namespace, prompt: str, seen: Measures) -> None:
    """One request on a connection of its own."""
    route, payload = body(args, prompt)
    data = json.dumps(payload).encode()
    started = time.perf_counter()
    last, counted, chunks = 0.0, 0, 0

    def on_event(line: bytes) -> None:
        nonlocal last, counted, chunks
        if line == b"[DONE]":
            return
        event = json.loads(line)
        if "error" in event:
            raise RuntimeError(str(event["error"])[:200])
        text, generated, prompt_tokens = text_and_count(args.api, event)
        counted = generated or counted
        seen.prompt_tokens += prompt_tokens
        if text:
            now = time.perf_counter()
            if last:
                seen.gaps.append(now - last)
            else:
                seen.ttft.append(now - started)
            last, chunks = now, chunks + 1

    try:
        reader, writer = await asyncio.open_connection(args.host, args.port, limit=1 << 20)
        head = f"POST {route} HTTP/1.1\r\nHost: {args.host}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + data)
        await asyncio.wait_for(events(reader, on_event), args.timeout)
        writer.close()
    except Exception as error:  # every failure is a figure of the report
        seen.errors.append(f"{type(error).__name__}: {error}"[:200])
        return
    seen.tokens += counted or chunks
    seen.chunks += chunks
    seen.whole.append(time.perf_counter() - started)


async def closed_loop(args: argparse.Namespace, clients: int, prompts: list[str]) -> Measures:
    """So many clients, each sending its next prompt when its last answer is complete."""
    seen, queue = Measures(), iter(prompts)

    async def client() -> None:
        for prompt in queue:
            await one(args, prompt, seen)

    await asyncio.gather(*[client() for _ in range(clients)])
    return seen


async def open_loop(args: argparse.Namespace, prompts: list[str]) -> Measures:
    """Requests at random times, `--rate` a second on average."""
    seen, rng, running = Measures(), random.Random(args.seed), []
    for prompt in prompts:
        running.append(asyncio.create_task(one(args, prompt, seen)))
        await asyncio.sleep(rng.expovariate(args.rate))
    await asyncio.gather(*running)
    return seen


def quantile(values: list[float], q: float) -> float | None:
    """In milliseconds; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return round(1e3 * ordered[min(len(ordered) - 1, int(q * len(ordered)))], 2)


def report(level: dict[str, Any], seen: Measures, wall: float) -> dict[str, Any]:
    """The figures of one level, as they go to JSON."""
    spread = {
        name: {
            "p50": quantile(values, 0.5),
            "p90": quantile(values, 0.9),
            "p99": quantile(values, 0.99),
        }
        for name, values in (("ttft_ms", seen.ttft), ("itl_ms", seen.gaps), ("e2e_ms", seen.whole))
    }
    return {
        **level,
        "requests": len(seen.whole),
        "errors": len(seen.errors),
        "first_error": seen.errors[0] if seen.errors else None,
        "wall_s": round(wall, 3),
        "output_tokens": seen.tokens,
        "output_tokens_per_s": round(seen.tokens / wall, 1),
        "prompt_tokens": seen.prompt_tokens,
        "chunks_per_token": round(seen.chunks / max(1, seen.tokens), 3),
        **spread,
    }


def timed(run: Coroutine[Any, Any, Measures]) -> tuple[Measures, float]:
    started = time.perf_counter()
    seen = asyncio.run(run)
    return seen, time.perf_counter() - started


def levels(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs a warm-up and every level; of `--repeat` runs the median by throughput is reported."""
    warm = make_prompts(args.warm, args.prompt_tokens, args.tokenizer, args.seed + 1)
    asyncio.run(closed_loop(args, min(4, args.warm), warm))
    done = []
    for index, clients in enumerate([0] if args.rate else args.concurrency):
        runs = []
        for repeat in range(args.repeat):
            count = args.requests or (6 if clients == 1 else 2 * clients)
            if args.rate:
                count = max(1, round(args.rate * args.duration))
            seed = args.seed + 1000 * (index + 1) + 100 * repeat
            prompts = make_prompts(count, args.prompt_tokens, args.tokenizer, seed)
            if args.rate:
                level: dict[str, Any] = {"rate": args.rate}
                seen, wall = timed(open_loop(args, prompts))
            else:
                level = {"concurrency": clients}
                seen, wall = timed(closed_loop(args, clients, prompts))
            runs.append(report(level, seen, wall))
        runs.sort(key=lambda r: r["output_tokens_per_s"])
        median = runs[len(runs) // 2]
        median["all_output_tokens_per_s"] = [r["output_tokens_per_s"] for r in runs]
        done.append(median)
    return done


def machine() -> dict[str, str]:
    """The CPU's name and the flags that decide which kernels run."""
    name, flags = platform.processor(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
            if line.startswith("flags"):
                wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
                flags = " ".join(f for f in wanted if f in line.split())
    except OSError:
        pass
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {"cpu": name, "flags": flags, "commit": commit}


def table(rows: list[dict[str, Any]], label: str) -> str:
    """The levels as a Markdown table."""
    head = ["load", "tok/s", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "errors"]
    lines = [f"| {label or 'server'}: " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        load = f"{row['concurrency']} streams" if "concurrency" in row else f"{row['rate']} req/s"
        times = [f"{row[k]['p50']} / {row[k]['p99']}" for k in ("ttft_ms", "itl_ms")]
        cells = [load, str(row["output_tokens_per_s"]), *times, str(row["errors"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:3000", help="loopback only (default %(default)s)")
    add("--api", choices=["completions", "chat", "tgi"], default="completions")
    add("--model", default="tgi", help="the `model` field of OpenAI routes (default %(default)s)")
    add("--tokenizer", required=True, help="folder with tokenizer.json, to cut prompts exactly")
    add("-c", "--concurrency", type=int, nargs="+", default=[1, 8, 32], help="closed loop levels")
    add("--rate", type=float, default=0.0, help="open loop: requests a second")
    add("--duration", type=float, default=30.0, help="open loop: seconds (default %(default)s)")
    add("-n", "--requests", type=int, default=0, help="requests a level (default 6, or 2 a stream)")
    add("--tokens", type=int, default=64, help="output tokens a request (default %(default)s)")
    add("--prompt-tokens", type=int, default=128, help="(default %(default)s)")
    add("--warm", type=int, default=2, help="requests before the first level (default %(default)s)")
    add(
        "--repeat", type=int, default=1, help="runs a level; the median is reported, all are listed"
    )
    add("--extra", type=json.loads, default={}, help="JSON merged into OpenAI bodies")
    add("--no-ignore-eos", action="store_true", help="for servers that refuse the field")
    add("--timeout", type=float, default=300.0, help="seconds a request (default %(default)s)")
    add("--seed", type=int, default=0)
    add("--label", default="", help="name of the server in the table")
    add("--json", dest="json_path", default="", help="where the figures go as JSON")
    args = parser.parse_args()
    url = urlsplit(args.url)
    args.host, args.port = url.hostname, url.port or 80
    if args.host not in LOOPBACK:
        parser.error("--url must be an address of this machine")
    return args


def main() -> int:
    args = arguments()
    rows = levels(args)
    print(table(rows, args.label))
    if args.json_path:
        facts = {"label": args.label, "api": args.api, **machine(), "levels": rows}
        Path(args.json_path).write_text(json.dumps(facts, indent=2) + "\n")
    for row in rows:
        if row["first_error"]:
            print(f"first error: {row['first_error']}", file=sys.stderr)
    return 1 if any(row["errors"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

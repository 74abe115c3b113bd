#!/usr/bin/env python3
"""Gaps between tokens of constrained and of free streams, in turn, on a server that runs.

    bench/grammar.py --port 3000 --streams 16 --rounds 4

A round is so many free streams at one time, then as many with a JSON schema that keeps them going.
Prints, for both, the median and the 99th percentile of the gaps, and their ratio.
"""

import argparse
import http.client
import json
import threading
import time
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

TOKENS = 96
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 10, "maxLength": 60},
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "integer"},
                    "kind": {"enum": ["person", "place", "thing"]},
                    "text": {"type": "string", "minLength": 10},
                },
                "required": ["id", "kind", "text"],
                "additionalProperties": False,
            },
            "minItems": 20,
        },
    },
    "required": ["title", "lines"],
    "additionalProperties": False,
}


def stream(port: int, seed: int, grammar: Any, gaps: list[float], at: threading.Barrier) -> None:
    parameters = {"max_new_tokens": TOKENS, "temperature": 1.0, "seed": seed}
    if grammar:
        parameters["grammar"] = grammar
    else:
        parameters["ignore_eos"] = True
    body = {"inputs": f"Note {seed}, as JSON:", "parameters": parameters}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    at.wait()
    connection.request(
        "POST", "/generate_stream", json.dumps(body), {"Content-Type": "application/json"}
    )
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    times = [time.perf_counter() for line in reply if line.startswith(b"data:")]
    assert grammar or len(times) == TOKENS, len(times)
    gaps += [b - a for a, b in pairwise(times)]


def together(port: int, streams: int, first: int, grammar: Any) -> list[float]:
    """The gaps of all streams."""
    gaps: list[float] = []
    barrier = threading.Barrier(streams)
    threads = [
        threading.Thread(target=stream, args=(port, first + i, grammar, gaps, barrier))
        for i in range(streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    grammar = {"type": "json", "value": SCHEMA}
    together(args.port, args.streams, 0, grammar)  # Warm, and the grammar is known.
    found: dict[str, list[float]] = {"free": [], "constrained": []}
    for round_ in range(args.rounds):
        first = 1000 * (round_ + 1)
        found["free"] += together(args.port, args.streams, first, None)
        found["constrained"] += together(args.port, args.streams, first, grammar)
    told = {}
    for kind, gaps in found.items():
        told[kind] = median(gaps), quantiles(gaps, n=100)[98]
        p50, p99 = (1000 * value for value in told[kind])
        print(f"{kind:12} {len(gaps):6} gaps, p50 {p50:6.2f} ms, p99 {p99:6.2f} ms")
    ratios = [b / a for a, b in zip(told["free"], told["constrained"], strict=True)]
    print(f"constrained ÷ free: p50 {ratios[0]:.3f}, p99 {ratios[1]:.3f}")


if __name__ == "__main__":
    main()

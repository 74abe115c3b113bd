"""How the device benchmarks measure: CUDA graphs over rotating buffers, timed by events."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# What a stream of reads and writes reaches on an H200.
BYTES_PER_SECOND = 4.19e12
# More than the second-level cache holds.
COLD_BYTES = 60e6


def copies_for(bytes_each: float, copies_max: int) -> int:
    """How many sets of buffers to rotate over, so that none is still in the cache."""
    return max(1, min(copies_max, round(COLD_BYTES / bytes_each + 0.5)))


def graph_us(launches: Sequence[Callable[[], object]], rounds: int, budget_us: float) -> float:
    """Median microseconds a launch when `rounds` rounds over `launches` are one graph.

    Args:
        launches: what to capture, in turn; each on buffers of its own.
        budget_us: about how long to measure.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()  # compiles
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for launch in launches:
                    launch()
        graph.replay()
        first_us = _replay_us(graph)
        replays = int(max(3, min(50, budget_us / max(first_us, 1.0))))
        times = sorted(_replay_us(graph) for _ in range(replays))
    torch.cuda.current_stream().wait_stream(stream)
    return times[len(times) // 2] / (rounds * len(launches))


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3

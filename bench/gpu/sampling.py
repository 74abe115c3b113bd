"""The sampler in Triton beside PyTorch's operations, at the vocabulary of Llama-3.1-8B.

    PYTHONPATH=server python3 bench/gpu/sampling.py [--short] [--json OUT]

--short prints one table and no more: microseconds of the device, and of the host that launches, by
kind of draw and rows; tokens are compared first.

Greedy: microseconds a step in a graph over logits that are not in the cache, by how the scan is
divided, and the share of memory's speed. Draws: microseconds of the device a step (in a graph, the
rows' indices being there already), and of the clock when called by operation, for both samplers;
PyTorch's waits for the device. Tokens are first compared with the reference sampler's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import BYTES_PER_SECOND, copies_for, graph_us
from torch import Tensor

from headrace.ops.sampling import BatchedSampling, SampleRows, Search, uniform
from headrace.ops.sampling.base import empty_samples
from headrace.ops.sampling.triton import Settings, Sizes, TritonSampling
from headrace.ops.triton import Gpu, gpu_at
from headrace.slots import KNOBS, features_of, knobs_of
from headrace.wire import Sampling

VOCAB = 128256
ROWS = [1, 8, 64, 256]
BUDGET_US = 60e3
COPIES_MAX = 64
SETTINGS = [Settings(1, 4), Settings(1, 8), Settings(2, 4), Settings(4, 4), Settings(8, 4)]
SETTINGS += [Settings(4, 8), Settings(2, 2)]

CASES = {
    "temperature": [Sampling(temperature=0.8)],
    "min-p": [Sampling(temperature=1.0, min_p=0.05)],
    "top-k 50": [Sampling(temperature=0.8, top_k=50)],
    "top-p 0.95": [Sampling(temperature=0.8, top_p=0.95)],
    "top-k, top-p": [Sampling(temperature=0.8, top_k=50, top_p=0.95)],
    "top-p, wide": [Sampling(temperature=4.0, top_p=0.95)],
    "typical-p": [Sampling(temperature=1.0, typical_p=0.9)],
    "penalties": [Sampling(temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.1)],
    "5 alternatives": [Sampling(top_n=5)],
}
CASES["all mixed"] = [one for case in CASES.values() for one in case] + [
    Sampling(),
    Sampling(temperature=0.7, top_k=40, top_p=0.9, logprob_raw=True, top_n=5),
]


def logits(rows: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As steep as a model's: the n-th best token weighs about n^-1.2."""
    generator = torch.Generator("cuda").manual_seed(seed)
    noise_SV = torch.rand((rows, VOCAB), device="cuda", generator=generator)
    return (15 - 1.2 * (noise_SV * VOCAB + 1).log()).to(dtype)


def rows_of(samplings: list[Sampling]) -> SampleRows:
    """What the server's sampler would give for these parameters."""
    values = [[getattr(s, name) for name in KNOBS] for s in samplings]
    table_SC = torch.tensor(values, device="cuda")
    count = len(samplings)
    state_QV = torch.zeros((count, VOCAB), dtype=torch.int32, device="cuda")
    state_QV[:, ::200] = 1
    drawn_S = uniform(np.arange(count, dtype=np.uint64), np.full(count, 7))
    return SampleRows(
        features_S=np.array([int(features_of(s)) for s in samplings]),
        top_n_S=np.array([s.top_n for s in samplings]),
        knobs=knobs_of(table_SC, torch.tensor([s.top_k for s in samplings], device="cuda")),
        uniform_S=torch.from_numpy(drawn_S).cuda(),
        state_QV=state_QV,
        state_slot_S=torch.arange(count, device="cuda"),
    )


def upload(array: np.ndarray) -> Tensor:
    """As the server's device does it."""
    pinned = torch.empty(array.shape, dtype=torch.int64, pin_memory=True)
    pinned.numpy()[...] = array
    return pinned.to("cuda", non_blocking=True)


def batched_sampling() -> BatchedSampling:
    def at_least(x_RV: Tensor, bound_R1: Tensor) -> tuple[Tensor, Tensor]:
        row_X, token_X = (x_RV >= bound_R1).nonzero(as_tuple=True)
        return row_X, token_X

    return BatchedSampling(Search(lambda x_RV: x_RV.argmax(1), at_least))


class Kept:
    """Uploads that are made once, so that a step can be recorded."""

    def __init__(self) -> None:
        self._made: dict[bytes, Tensor] = {}

    def __call__(self, array: np.ndarray) -> Tensor:
        key = array.tobytes()
        if key not in self._made:
            self._made[key] = upload(array)
        return self._made[key]


def clock_us(launch: Callable[[], object], seconds: float = 0.1) -> float:
    """Microseconds a call by the clock, the device's work included."""
    for _ in range(3):
        launch()
    torch.cuda.synchronize()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            launch()
        count += 5
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count * 1e6


SHORT = ["temperature", "top-k 50", "top-p 0.95", "top-k, top-p", "min-p", "typical-p"]
SHORT += ["top-p, wide"]


def host_us(launch: Callable[[], object], calls: int = 30) -> float:
    """Microseconds a call that the host is busy: calls are fewer than a device's queue takes."""
    times: list[float] = []
    for _ in range(7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            launch()
        times.append((time.perf_counter() - began) / calls * 1e6)
        torch.cuda.synchronize()
    return sorted(times)[len(times) // 2]


def short(gpu: Gpu, rows: int) -> dict[str, tuple[float, float]]:
    """Microseconds of the device and of the host a step, by kind of draw; logits are cold."""
    inputs = [logits(rows, seed) for seed in range(copies_for(rows * VOCAB * 2, 16))]
    ours, recorded = TritonSampling(gpu, upload), TritonSampling(gpu, Kept())
    out, slot_S = empty_samples(inputs[0]), torch.arange(rows, device="cuda")
    last_token_Z = torch.zeros(rows, dtype=torch.int64, device="cuda")
    rounds = max(1, 16 // len(inputs))
    greedy_ = [lambda x=x: ours.greedy_accept(x, slot_S, last_token_Z, out) for x in inputs]
    times = {"greedy": (graph_us(greedy_, rounds, BUDGET_US), host_us(greedy_[0]))}
    for name in SHORT:
        given = rows_of([CASES[name][i % len(CASES[name])] for i in range(rows)])
        recorded.sample(inputs[0], given)
        torch.cuda.synchronize()
        launches = [lambda x=x, rows=given: recorded.sample(x, rows) for x in inputs]
        device_us = graph_us(launches, rounds, BUDGET_US)
        times[name] = device_us, host_us(lambda rows=given: ours.sample(inputs[0], rows))
    return times


def print_short(times: dict[int, dict[str, tuple[float, float]]]) -> None:
    print("\nus of the device / of the host a step")
    print(f"{'':<14}" + "".join(f"{f'{rows} rows':>16}" for rows in times))
    for name in next(iter(times.values())):
        told = [f"{by_name[name][0]:.1f} / {by_name[name][1]:.0f}" for by_name in times.values()]
        print(f"{name:<14}" + "".join(f"{one:>16}" for one in told))


def check(gpu: Gpu) -> None:
    """Greedy against float32; draws against the batched sampler, near boundaries either token."""
    ours, batched = TritonSampling(gpu, upload), batched_sampling()
    for rows in (1, 8, 256, 512):
        x_SV = logits(rows, rows)
        samples, wide_SV = ours.greedy(x_SV), x_SV.float()
        first_S = (wide_SV == wide_SV.amax(1, keepdim=True)).int().argmax(1)
        off = (samples.logprob_S - wide_SV.log_softmax(1).amax(1)).abs().max()
        wrong = int((samples.token_S != first_S).sum())
        print(f"greedy, {rows} rows: {wrong} wrong, log-probabilities off by {float(off):.1e}")
    for name, case in CASES.items():
        rows = rows_of([case[i % len(case)] for i in range(64)])
        x_SV = logits(64, 7)
        drawn = ours.sample(x_SV.clone(), rows)
        assert rows.uniform_S is not None
        near = [
            batched.sample(x_SV.float(), replace(rows, uniform_S=(rows.uniform_S + d).clamp_min(0)))
            for d in (0.0, -2e-6, 2e-6)
        ]
        is_one_S = torch.stack([drawn.token_S == s.token_S for s in near]).any(0)
        same = int((drawn.token_S == near[0].token_S).sum())
        print(f"{name}: {same} of 64 tokens the same, {int((~is_one_S).sum())} unexplained")


def greedy(gpu: Gpu, rows: int) -> dict[str, float]:
    """Microseconds a step by variant."""
    copies = copies_for(rows * VOCAB * 2, COPIES_MAX)
    inputs = [logits(rows, seed) for seed in range(copies)]
    out, slot_S = empty_samples(inputs[0]), torch.arange(rows, device="cuda")
    last_token_Z = torch.zeros(rows, dtype=torch.int64, device="cuda")

    def plain(x_SV: Tensor) -> None:
        wide_SV = x_SV.float()
        token_S = wide_SV.argmax(1)
        logprob_S = wide_SV.log_softmax(1).gather(1, token_S[:, None])[:, 0]
        out.bad_S.copy_(~logprob_S.isfinite())
        last_token_Z.index_copy_(0, slot_S, token_S)

    ours = TritonSampling(gpu, upload)
    no_pdl = TritonSampling(replace(gpu, pdl=False), upload)
    variants: dict[str, Callable[[Tensor], object]] = {
        "pytorch": plain,
        "no pdl": lambda x: no_pdl.greedy_accept(x, slot_S, last_token_Z, out),
        "default": lambda x: ours.greedy_accept(x, slot_S, last_token_Z, out),
    }
    for settings in SETTINGS:
        name = f"scan {settings.group}/{settings.warps}"
        variants[name] = lambda x, s=settings: ours.scan(x, s)
    for piece in (2048, 8192):
        other = TritonSampling(gpu, upload, Sizes(piece=piece))
        variants[f"scan of {piece}"] = other.scan
    times: dict[str, float] = {}
    for name, run in variants.items():
        launches = [lambda x=x, run=run: run(x) for x in inputs]
        try:
            times[name] = graph_us(launches, max(1, 16 // copies), BUDGET_US)
        except Exception as error:  # the other variants are still worth measuring
            print(f"greedy {rows} {name}: {type(error).__name__}: {str(error)[:300]}")
    return times


def draws(gpu: Gpu, name: str, rows: int) -> dict[str, float]:
    """Microseconds a step: ours on the device, ours by the clock, PyTorch's by the clock."""
    case = CASES[name]
    given = rows_of([case[i % len(case)] for i in range(rows)])
    x_SV = logits(rows, 3)
    recorded, ours = TritonSampling(gpu, Kept()), TritonSampling(gpu, upload)
    batched = batched_sampling()
    times: dict[str, float] = {}
    recorded.sample(x_SV, given)
    torch.cuda.synchronize()
    variants: dict[str, Callable[[], float]] = {
        "device": lambda: graph_us([lambda: recorded.sample(x_SV, given)], 1, BUDGET_US / 4),
        "clock": lambda: clock_us(lambda: ours.sample(x_SV, given)),
        "pytorch": lambda: clock_us(lambda: batched.sample(x_SV.float(), given)),
    }
    for variant, measured in variants.items():
        try:
            times[variant] = measured()
        except Exception as error:  # as above
            print(f"{name} {rows} {variant}: {type(error).__name__}: {str(error)[:300]}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--short", action="store_true", help="one table of device and host")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    began = time.monotonic()
    gpu = gpu_at(torch.device("cuda", 0))
    with torch.inference_mode():
        check(gpu)
        compiled = time.monotonic() - began
        if args.short:
            table = {rows: short(gpu, rows) for rows in args.rows}
            print_short(table)
            if args.json:
                args.json.write_text(json.dumps(table, indent=1))
            return
        best = {rows: greedy(gpu, rows) for rows in args.rows}
        drawn = {
            f"{name}, {rows}": draws(gpu, name, rows)
            for rows in (1, args.rows[-1])
            for name in CASES
        }
    print(f"\ncompiled and compared in {compiled:.0f} s\ngreedy, us a step")
    for rows, times in best.items():
        told = "  ".join(f"{name} {us:.1f}" for name, us in times.items())
        share = rows * VOCAB * 2 / BYTES_PER_SECOND * 1e6 / times.get("default", float("nan"))
        print(f"{rows:>4}  {told}  default at {share:.2f} of memory")
    print("draws, us a step: ours on the device, ours by the clock, PyTorch by the clock")
    for name, times in drawn.items():
        told = "  ".join(
            f"{times.get(k, float('nan')):8.0f}" for k in ("device", "clock", "pytorch")
        )
        print(f"{name:<22}{told}")
    print(f"{time.monotonic() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps({"greedy": best, "draws": drawn}, indent=1))


if __name__ == "__main__":
    main()

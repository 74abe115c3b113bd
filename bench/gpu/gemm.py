"""Matrix products of few rows: cuBLAS beside our kernels, alone and in a chain of layers.

    PYTHONPATH=server python3 bench/gpu/gemm.py [--rows 1 8 32] [--json OUT]

First every setting is compared with a product in float32, on fresh random inputs and poisoned
outputs. Then microseconds a product, weights cold, at the shapes of Llama-3.1-8B. Last what
decides: microseconds a layer in a graph of many layers, small kernels between the products, without
and with programmatic dependent launch and weights fetched ahead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from measure import BYTES_PER_SECOND, graph_us
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.matmul.settings import BUCKETS, Setting, bucket_of
from headrace.ops.matmul.skinny import Scratch, _prefetch, product
from headrace.ops.rms_norm.triton import TritonRmsNorm
from headrace.ops.silu_mul.triton import TritonSiluMul
from headrace.ops.triton import PDL_CAPABILITY, Gpu

WIDTH, MLP_WIDTH, QKV_WIDTH, VOCAB, EPS = 4096, 14336, 6144, 128256, 1e-5
SHAPES = {
    "qkv": (QKV_WIDTH, WIDTH),
    "o": (WIDTH, WIDTH),
    "gate_up": (2 * MLP_WIDTH, WIDTH),
    "down": (WIDTH, MLP_WIDTH),
    "head": (VOCAB, WIDTH),
}
LAYERS = 8  # of a graph; 3.5 GB, so that no weight is still in the cache
BUDGET_US = 3000.0  # a measurement
ATTENTION_US = 6.0
FETCH_PROGRAMS = 132
PREFETCH = 64  # KiB a program, where the amount is not what is measured
PREFETCHES = (16, 32, 64, 128, 448)
ROUNDING = 2.0**-7  # of bfloat16
THREADS = 16  # that compile

# Kinds of settings: (block_n, block_k, stages, warps).
VECTORS = [
    *((16, 512, 4, 4), (16, 256, 4, 4), (8, 512, 4, 4), (8, 512, 2, 4), (8, 1024, 4, 4)),
    *((4, 1024, 4, 4), (4, 2048, 3, 4)),
]
GATED_VECTORS = [(4, 512, 4, 4), (8, 512, 3, 4), (2, 1024, 4, 4)]
# Of a bucket: those with the outputs as the tensor cores' rows, and those with the input's.
SWAPPED = {
    16: [(64, 64, 4, 4), (64, 128, 4, 4), (64, 256, 3, 4), (128, 64, 4, 4), (128, 128, 3, 8)],
    32: [(64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 3, 8)],
    64: [(64, 64, 4, 4), (64, 128, 3, 4), (128, 64, 4, 4), (128, 128, 3, 8)],
}
STRAIGHT = {16: [(16, 256, 4, 4), (32, 128, 4, 4)], 32: [(32, 128, 4, 4)], 64: []}
GATED_SWAPPED = {
    16: [(64, 64, 4, 4), (64, 128, 2, 4)],
    32: [(64, 64, 4, 4)],
    64: [(64, 64, 4, 4)],
}
# Of a vector and of tiles: what leaves most room for the next kernel beside it.
LEAN = ((8, 512, 2), (64, 64, 4))
PROGRAMS = (190, 600)  # where a sum is split: so many programs at least, at most

Launch = Callable[[], object]


@triton.jit
def standin(
    x, y, turns, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """A small kernel between products: reads, waits for a chain of `turns` sums, writes."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + tl.program_id(0) * IN + column).to(tl.float32)
    for _ in range(turns):
        value = value * -1.0 + 1e-6  # stays random
    tl.store(y + tl.program_id(0) * OUT + column, value.to(y.dtype.element_ty))


@triton.jit
def fetch(w, chunk_bytes):
    """Asks the L2 for the first 16 chunks a program of a weight in bfloat16."""
    first = tl.program_id(0).to(tl.int64) * 16 * (chunk_bytes // 2)
    _prefetch(w + first, tl.cast(16, tl.int32), chunk_bytes, chunk_bytes)


@dataclass(frozen=True)
class Chain:
    """A way to compute the layers."""

    name: str
    choose: Callable[[str], Setting | None]  # of a weight; None is cuBLAS
    pdl: bool = False
    gated: Setting | None = None
    fork: bool = False  # whether weights are fetched by a kernel beside the small ones


class Bench:
    """Weights on the device, and what is measured with them."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        pdl = capability >= PDL_CAPABILITY
        self.gpu = Gpu(capability, properties.multi_processor_count, pdl)
        self.no_pdl = replace(self.gpu, pdl=False)
        self.weights = {
            name: [random(*shape) / shape[1] ** 0.5 for _ in range(2 if name == "head" else LAYERS)]
            for name, shape in SHAPES.items()
        }
        self.norm = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16)
        self.scratch = Scratch(torch.device("cuda"))
        self.side = torch.cuda.Stream()
        self.turns = 0

    # === settings ===

    def candidates(self, name: str, rows: int) -> list[Setting]:
        bucket = BUCKETS[bucket_of(rows)]
        if bucket == 1:
            return [Setting(1, *s[:3], warps=s[3], prefetch=PREFETCH) for s in VECTORS]
        kinds = [(s, True) for s in SWAPPED[bucket]] + [(s, False) for s in STRAIGHT[bucket]]
        made = []
        for (block_n, block_k, stages, warps), swap in kinds:
            tiles = SHAPES[name][0] // block_n
            splits = [s for s in (1, 2, 4, 8) if PROGRAMS[0] <= tiles * s <= PROGRAMS[1]] or [1]
            for split in splits:
                setting = Setting(bucket, block_n, block_k, stages, split, warps, swap, PREFETCH)
                self.scratch.reserve(setting, SHAPES[name][0])
                made.append(setting)
        return made

    def gated_candidates(self, rows: int) -> list[Setting]:
        bucket = BUCKETS[bucket_of(rows)]
        kinds = GATED_VECTORS if bucket == 1 else GATED_SWAPPED[bucket]
        return [
            Setting(bucket, *s[:3], warps=s[3], swap=bucket > 1, prefetch=PREFETCH, gated=True)
            for s in kinds
        ]

    def multiply(self, name: str, i: int, x: Tensor, setting: Setting | None, gpu: Gpu) -> Tensor:
        weight = self.weights[name][i % len(self.weights[name])]
        if setting is None:
            return F.linear(x, weight)
        return product(x, weight, None, setting, self.scratch, gpu)

    # === correctness ===

    def compile(self, cases: Iterable[tuple[str, Setting | None, Gpu]]) -> None:
        """Runs settings once, in parallel; one run serves all shapes that share a setting."""
        # An amount to be fetched is an argument, not a constant of the kernel.
        distinct = {
            (replace(setting, prefetch=min(setting.prefetch, 1)), gpu): (name, setting, gpu)
            for name, setting, gpu in cases
            if setting is not None
        }

        def compile_one(case: tuple[str, Setting, Gpu]) -> None:
            name, setting, gpu = case
            try:
                self.multiply(name, 0, random(setting.rows, SHAPES[name][1]), setting, gpu)
            except Exception as error:
                print(f"{name} {short(setting)}: {type(error).__name__} {str(error)[:120]}")

        first, *rest = distinct.values()
        compile_one(first)  # alone: Triton sets itself up
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(compile_one, rest))
        torch.cuda.synchronize()

    def check(self, cases: Iterable[tuple[str, int, Setting]]) -> set[tuple[str, Setting]]:
        """Returns the cases that failed; compiles all, in parallel."""
        cases = sorted(set(cases), key=repr)
        self.compile((name, setting, self.gpu) for name, _, setting in cases)
        return {(n, s) for n, rows, s in cases if not self.right(n, rows, s)}

    def right(self, name: str, rows: int, setting: Setting) -> bool:
        x = random(rows, SHAPES[name][1])
        expected = x.float() @ self.weights[name][-1].float().T
        if setting.gated:
            gate, up = expected.chunk(2, dim=1)
            expected = F.silu(gate) * up
        try:
            torch.full(expected.shape, float("nan"), dtype=x.dtype, device="cuda")  # poison
            y = self.multiply(name, -1, x, setting, self.gpu)
            off = (y.float() - expected).abs().max() / expected.abs().max()
            again = self.multiply(name, -1, x, setting, self.gpu)
        except Exception as error:
            print(f"{name} {short(setting)}: {type(error).__name__} {str(error)[:120]}")
            return False
        fine = bool(off <= 2 * ROUNDING) and torch.equal(y, again)
        if not fine:
            print(f"WRONG {name} rows {rows} {short(setting)}: off by {float(off):.2g}")
        return fine

    # === times ===

    def product_us(self, name: str, rows: int, setting: Setting | None) -> float:
        x = random(rows, SHAPES[name][1])
        copies = len(self.weights[name])
        launches = [lambda i=i: self.multiply(name, i, x, setting, self.gpu) for i in range(copies)]
        return graph_us(launches, 2, BUDGET_US)

    def calibrate(self) -> None:
        """Sets how long the stand-in of attention takes."""
        x = random(1, QKV_WIDTH)

        def us(turns: int) -> float:
            self.turns = turns
            return graph_us([lambda: self.attention(x, self.no_pdl)], 16, BUDGET_US)

        none, many = us(0), us(4000)
        self.turns = max(0, round(4000 * (ATTENTION_US - none) / (many - none)))

    def attention(self, qkv: Tensor, gpu: Gpu) -> Tensor:
        rows = qkv.shape[0]
        programs = 64 if rows <= 8 else 8
        y = torch.empty((rows, WIDTH), device="cuda", dtype=qkv.dtype)
        block = WIDTH // programs
        sizes = {"IN": QKV_WIDTH, "OUT": WIDTH, "BLOCK": block}
        gpu.run(standin, (rows, programs), qkv, y, self.turns, warps=4, **sizes)
        return y

    def rope(self, qkv: Tensor, gpu: Gpu) -> None:
        sizes = {"IN": QKV_WIDTH, "OUT": QKV_WIDTH, "BLOCK": 128}
        gpu.run(standin, (qkv.shape[0], 48), qkv, qkv, 0, warps=1, **sizes)

    def beside(self, name: str, i: int, mib: float) -> None:
        """Fetches the head of a weight on a branch of the graph."""
        chunk = int(mib * 2**20) // (FETCH_PROGRAMS * 16) // 16 * 16
        self.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.side):
            fetch[(FETCH_PROGRAMS,)](self.weights[name][i], chunk, num_warps=1)

    def layer_us(self, rows: int, chain: Chain) -> float:
        gpu = self.gpu if chain.pdl else self.no_pdl
        norm, silu_mul = TritonRmsNorm(gpu), TritonSiluMul(gpu)
        start, residual = random(rows, WIDTH), random(rows, WIDTH)

        def ahead(name: str, i: int, mib: float) -> None:
            if chain.fork:
                self.beside(name, i % LAYERS, mib)

        def layers() -> None:
            x, r = start, residual
            for i in range(LAYERS):
                ahead("qkv", i, 12)
                h, r = norm.add_rms_norm(x, r, self.norm, EPS)
                qkv = self.multiply("qkv", i, h, chain.choose("qkv"), gpu)
                ahead("o", i, 24)
                self.rope(qkv, gpu)
                a = self.attention(qkv, gpu)
                x = self.multiply("o", i, a, chain.choose("o"), gpu)
                ahead("gate_up", i, 12)
                h, r = norm.add_rms_norm(x, r, self.norm, EPS)
                if chain.gated is not None:
                    act = self.multiply("gate_up", i, h, chain.gated, gpu)
                else:
                    gate_up = self.multiply("gate_up", i, h, chain.choose("gate_up"), gpu)
                    ahead("down", i, 12)
                    act = silu_mul(gate_up)
                x = self.multiply("down", i, act, chain.choose("down"), gpu)
            if chain.fork:
                torch.cuda.current_stream().wait_stream(self.side)

        return graph_us([layers], 1, 2 * BUDGET_US) / LAYERS


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def short(setting: Setting | None) -> str:
    if setting is None:
        return "cuBLAS"
    kind = "gated" if setting.gated else "swap" if setting.swap else "rows"
    return (
        f"{kind} n{setting.block_n} k{setting.block_k} st{setting.stages}"
        f" w{setting.warps} split{setting.split}"
    )


def limit_us(name: str) -> float:
    return SHAPES[name][0] * SHAPES[name][1] * 2 / BYTES_PER_SECOND * 1e6


Best = dict[tuple[str, int], Setting]


def alone(bench: Bench, rows_all: list[int], failed: set[tuple[str, Setting]]) -> tuple[Best, list]:
    """Each product by itself; returns the best setting of each."""
    best: Best = {}
    figures = []
    print("\nweight   rows  limit  cuBLAS (share)    ours (share)  settings, best first")
    for name in SHAPES:
        for rows in rows_all:
            limit, cublas = limit_us(name), bench.product_us(name, rows, None)
            settings = bench.candidates(name, rows)
            settings += bench.gated_candidates(rows) if name == "gate_up" else []
            timed = sorted(
                ((bench.product_us(name, rows, s), s) for s in settings if (name, s) not in failed),
                key=lambda pair: pair[0],
            )
            for us, setting in reversed(timed):
                key = "gated" if setting.gated else name
                best[key, rows] = setting
                figures.append((name, rows, short(setting), us))
            figures.append((name, rows, "cuBLAS", cublas))
            if timed:
                tops = ", ".join(f"{us:.1f} {short(s)}" for us, s in timed[:3])
                us = timed[0][0]
                print(
                    f"{name:8} {rows:4} {limit:6.1f} {cublas:7.1f} ({limit / cublas:.2f})"
                    f" {us:7.1f} ({limit / us:.2f})  {tops}",
                    flush=True,
                )
    return best, figures


def chains(bench: Bench, best: Best, rows: int) -> list[Chain]:
    """What is compared in a graph of layers."""

    def ours(prefetch: int, late: bool = False) -> Callable[[str], Setting | None]:
        return lambda name: replace(best[name, rows], prefetch=prefetch, late=late)

    made = [
        Chain("cuBLAS", lambda name: None),
        Chain("cuBLAS, small PDL", lambda name: None, pdl=True),
        Chain("cuBLAS, fork", lambda name: None, fork=True),
        Chain("ours", ours(prefetch=0)),
        Chain("PDL", ours(prefetch=0), pdl=True),
    ]
    made += [Chain(f"PDL {kib}K", ours(prefetch=kib), pdl=True) for kib in PREFETCHES]
    made.append(Chain(f"late {PREFETCH}K", ours(prefetch=PREFETCH, late=True), pdl=True))
    for kib in (32, 128):
        gated = replace(best["gated", rows], prefetch=kib)
        made.append(Chain(f"gated {kib}K", ours(prefetch=kib), pdl=True, gated=gated))

    def lean(name: str) -> Setting:
        settings = bench.candidates(name, rows)
        fit = [s for s in settings if (s.block_n, s.block_k, s.stages) in LEAN]
        return max(fit, key=lambda s: s.split)

    made.append(Chain(f"lean {PREFETCH}K", lean, pdl=True))
    # The products of the widest matrix are the library's best.
    mixed = ours(prefetch=PREFETCH)
    made.append(
        Chain("gate_up cuBLAS", lambda name: None if name == "gate_up" else mixed(name), pdl=True)
    )
    return made


def together(bench: Bench, best: Best, rows_all: list[int]) -> list:
    """Microseconds a layer, each way."""
    bench.calibrate()
    bench.compile(
        (name, setting, bench.gpu if chain.pdl else bench.no_pdl)
        for rows in rows_all
        for chain in chains(bench, best, rows)
        for name in SHAPES
        for setting in (chain.choose(name), chain.gated if name == "gate_up" else None)
    )
    limit = sum(limit_us(name) for name in SHAPES if name != "head")
    figures = []
    print(f"\nus a layer (weights alone {limit:.1f}; attention is {ATTENTION_US} us of latency)")
    for rows in rows_all:
        row = []
        for chain in chains(bench, best, rows):
            try:
                us = bench.layer_us(rows, chain)
            except Exception as error:
                row.append(f"{chain.name}: {type(error).__name__} {str(error)[:60]}")
                continue
            figures.append((rows, chain.name, us))
            row.append(f"{chain.name} {us:.1f}")
        print(f"rows {rows}: " + " | ".join(row), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    bench = Bench()
    cases = [(n, rows, s) for rows in args.rows for n in SHAPES for s in bench.candidates(n, rows)]
    cases += [("gate_up", rows, s) for rows in args.rows for s in bench.gated_candidates(rows)]
    failed = bench.check(cases)
    print(f"{len(set(cases))} cases, {len(failed)} wrong; {time.perf_counter() - began:.1f} s")
    best, products = alone(bench, args.rows, failed)
    layers = together(bench, best, args.rows)
    print("\nbest settings, prefetch to be taken from the chain:")
    for (name, rows), setting in sorted(best.items()):
        print(f"  {name} {rows}: {setting}")
    if args.json:
        args.json.write_text(json.dumps({"products": products, "layers": layers}))
    print(f"{time.perf_counter() - began:.1f} s in all")


if __name__ == "__main__":
    main()

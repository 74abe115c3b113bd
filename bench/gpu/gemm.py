"""Matrix products of few rows: cuBLAS beside our kernels, alone and in a chain of layers.

    PYTHONPATH=server python3 bench/gpu/gemm.py [--rows 1 8 32] [--ranks 2] [--json OUT]

First every setting is compared with a product in float32, on fresh random inputs and poisoned
outputs. Then microseconds a product, weights cold, at the shapes of Llama-3.1-8B. Last what
decides: microseconds a layer in a graph of many layers, small kernels between the products. There
one product after the other takes the setting that is best beside the others as they are, starting
from the best alone, and once more with the ways to overlap its neighbours changed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from measure import BYTES_PER_SECOND, graph_us
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.matmul.settings import (
    BUCKETS,
    ROWS_MAX,
    Setting,
    best,
    best_gated,
    bucket_of,
)
from headrace.ops.matmul.skinny import Scratch, product
from headrace.ops.quant_matmul import CodedWeight, Kind, groups
from headrace.ops.quant_matmul.base import pack_halves
from headrace.ops.quant_matmul.settings import best_channels, best_groups, best_values
from headrace.ops.rms_norm.triton import TritonRmsNorm
from headrace.ops.rows8 import Rows8
from headrace.ops.rows8.reference import quantize_rows
from headrace.ops.rows8.triton import TritonQuantizeRows
from headrace.ops.silu_mul.triton import TritonSiluMul
from headrace.ops.triton import Gpu, gpu_at
from headrace.quant.on_load import quantize

WIDTH, MLP_WIDTH, QKV_WIDTH, VOCAB, EPS = 4096, 14336, 6144, 128256, 1e-5


def shapes(ranks: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a rank's share of each weight."""
    return {
        "qkv": (QKV_WIDTH // ranks, WIDTH),
        "o": (WIDTH, WIDTH // ranks),
        "gate_up": (2 * MLP_WIDTH // ranks, WIDTH),
        "down": (WIDTH, MLP_WIDTH // ranks),
        "head": (VOCAB // ranks, WIDTH),
    }


SHAPES = shapes(1)  # `--ranks` puts a rank's in their place
WEIGHT_BYTES: dict[str, float] = dict.fromkeys(
    SHAPES, 2
)  # an element; `--weights` makes it 1, but for the head's
LAYERS = 8  # of a graph; 3.5 GB, so that no weight is still in the cache
BUDGET_US = 3000.0  # a measurement
ATTENTION_US = 6.0
ROUNDING = 2.0**-7  # of bfloat16
THREADS = 16  # that compile
FINALISTS = 3  # of the settings alone, that are tried in the chain
AGAIN = 6  # of those, so many once more
BASE = 2  # of them, so many with every way to overlap

# Kinds of settings: (block_n, block_k, stages, warps).
VECTORS = [
    *((4, 2048, 3, 4), (4, 2048, 2, 4), (4, 2048, 1, 4), (8, 1024, 4, 4), (8, 1024, 3, 4)),
    *((8, 1024, 1, 4), (16, 512, 4, 4), (16, 512, 3, 4), (16, 512, 1, 4), (8, 512, 4, 4)),
    *((4, 1024, 4, 4), (2, 2048, 2, 4), (1, 2048, 4, 4), (8, 2048, 2, 8), (16, 1024, 2, 8)),
    *((2, 4096, 1, 4), (4, 4096, 1, 8)),
]
GATED_VECTORS = [(8, 512, 3, 4), (4, 512, 4, 4), (4, 1024, 3, 4), (2, 2048, 3, 4), (8, 1024, 2, 8)]
# Of a bucket: those with the outputs as the tensor cores' rows, and those with the input's.
SWAPPED = {
    16: [
        *((64, 64, 4, 4), (64, 128, 4, 4), (64, 128, 3, 4), (64, 256, 3, 4)),
        *((128, 64, 4, 4), (128, 128, 3, 8)),
    ],
    32: [(64, 64, 4, 4), (64, 128, 4, 4), (64, 128, 3, 4), (128, 64, 4, 4), (128, 128, 3, 8)],
    64: [(64, 64, 4, 4), (64, 128, 3, 4), (128, 64, 4, 4), (128, 128, 3, 8)],
}
STRAIGHT = {
    16: [(16, 256, 4, 4), (16, 256, 3, 4), (32, 128, 4, 4), (32, 256, 3, 4), (64, 128, 4, 4)],
    32: [(16, 256, 4, 4), (32, 128, 4, 4), (32, 256, 3, 8)],
    64: [(32, 128, 4, 4)],
}
GATED_SWAPPED = {
    16: [(64, 64, 4, 4), (64, 128, 2, 4)],
    32: [(64, 64, 4, 4)],
    64: [(64, 64, 4, 4)],
}
# Of four-bit weights in groups: (stages, warps, swap).
GROUPS = [
    *((3, 4, True), (4, 4, True), (6, 4, True), (4, 8, True)),
    *((4, 4, False), (6, 4, False), (4, 2, False)),
]
# Of weights and inputs of eight bits: (block_n, block_k, stages, warps, swap).
EIGHTS = [
    *((64, 128, 4, 4, True), (64, 256, 4, 4, True), (64, 256, 3, 4, True)),
    *((128, 128, 4, 4, True), (128, 128, 4, 8, True), (64, 512, 2, 4, True)),
    *((32, 256, 4, 4, False), (32, 128, 4, 4, False), (64, 256, 3, 4, False)),
]
EIGHTS_128 = [
    *((64, 128, 4, 4, True), (64, 256, 3, 8, True), (128, 128, 3, 8, True), (128, 128, 4, 8, True)),
    *((64, 128, 4, 8, False), (64, 256, 3, 8, False), (32, 256, 3, 4, False)),
]
# Of those whose codes stand for values, which takes twice the instructions.
VALUED = [(3, 4, True), (3, 8, True), (4, 8, True), (6, 4, False), (4, 8, False), (6, 8, False)]
VALUED_PROGRAMS = (190, 1300)
PROGRAMS = (190, 600)  # where a sum is split: so many programs at least, at most


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


# Of each weight; None is cuBLAS. A gated setting of gate_up takes the activation along.
Choice = dict[str, Setting | None]


class Bench:
    """Weights on the device, and what is measured with them."""

    def __init__(self, weights: str = "bfloat16") -> None:
        self.gpu = gpu_at(torch.device("cuda", 0))
        self.weights_are = weights
        self.valued = weights == "nf4"
        self.eight = weights == "fp8"  # whether inputs have eight bits as well
        self.no_pdl = replace(self.gpu, pdl=False)
        self.scratch = Scratch(torch.device("cuda"))
        self.weights = {
            name: [random(*shape) / shape[1] ** 0.5 for _ in range(2 if name == "head" else LAYERS)]
            for name, shape in SHAPES.items()
        }
        # By weight: its numbers of 8 bits and a scale a row; the bench then multiplies these.
        self.coded: dict[int, tuple[Tensor, Tensor]] = {}
        self.groups: dict[int, groups.Groups] = {}
        if weights != "bfloat16":
            for name, some in self.weights.items():
                for i, weight in enumerate(some if name != "head" else ()):
                    if weights in FOUR_BITS:
                        made = FOUR_BITS[weights](weight)
                        some[i] = made.dequantize().to(torch.bfloat16)
                        self.groups[some[i].data_ptr()] = groups.pack(
                            made, torch.bfloat16, self.scratch
                        )
                    else:
                        codes, scales = coded(weight, weights)
                        some[i] = codes.to(torch.bfloat16).mul_(scales[:, None])
                        self.coded[some[i].data_ptr()] = codes, scales
        self.norm = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16)
        self.turns = 0

    # === settings ===

    def candidates(self, name: str, rows: int) -> list[Setting]:
        outputs = SHAPES[name][0]
        bucket = 128 if rows > ROWS_MAX else BUCKETS[bucket_of(rows)]
        if self.eight and name != "head":
            return self._vectors(name) * (rows == 1) + [
                Setting(max(bucket, 16), n, k, stages, split, warps, swap)
                for n, k, stages, warps, swap in (EIGHTS_128 if bucket == 128 else EIGHTS)
                for split in (1, 2, 4, 8)
                if PROGRAMS[0] <= outputs // n * split <= PROGRAMS[1] or split == 1
            ]
        if self.groups and name != "head":
            fewest, most = VALUED_PROGRAMS if self.valued else PROGRAMS
            return [
                Setting(max(bucket, 16), 64, 128, stages, split, warps, swap)
                for stages, warps, swap in (VALUED if self.valued else GROUPS)
                for split in (1, 2, 4, 8)
                if fewest <= outputs // 64 * split <= most or split == 1
            ]
        made = self._vectors(name) if bucket == 1 else []
        kinds = [(s, True) for s in SWAPPED.get(bucket, [])]
        kinds += [(s, False) for s in STRAIGHT.get(bucket, [])]
        for (block_n, block_k, stages, warps), swap in kinds:
            tiles = outputs // block_n
            splits = [s for s in (1, 2, 4, 8) if PROGRAMS[0] <= tiles * s <= PROGRAMS[1]] or [1]
            made += [Setting(bucket, block_n, block_k, stages, s, warps, swap) for s in splits]
        if name == "gate_up" and 1 < bucket <= ROWS_MAX:
            for *kind, warps in GATED_SWAPPED[bucket]:
                made.append(Setting(bucket, *kind, warps=warps, swap=True, gated=True))
        return made

    def _vectors(self, name: str) -> list[Setting]:
        inputs = SHAPES[name][1]

        def plain(kinds: list[tuple[int, int, int, int]], gated: bool) -> list[Setting]:
            return [
                Setting(1, *kind[:3], warps=kind[3], gated=gated, ahead=ahead)
                for kind in kinds
                for ahead in (False, True)
                if inputs % kind[1] == 0
            ]

        made = plain(VECTORS, False)
        if name == "gate_up":
            made += plain(GATED_VECTORS, True)
        return made

    def multiply(
        self, name: str, i: int, x: Tensor | Rows8, setting: Setting | None, gpu: Gpu
    ) -> Tensor:
        weight = self.weights[name][i % len(self.weights[name])]
        if setting is None:
            return F.linear(x.widened().to(weight.dtype) if isinstance(x, Rows8) else x, weight)
        if weight.data_ptr() in self.groups:
            packed = self.groups[weight.data_ptr()]
            return groups.product(x, packed, None, setting, self.scratch, gpu)
        codes, scales = self.coded.get(weight.data_ptr(), (weight, None))
        shared = (None, setting, self.scratch, gpu)
        if isinstance(x, Rows8):
            of_x = {"x_scales_M": x.scale_T, "dtype": weight.dtype}
            return product(x.codes_TX, codes, *shared, scales_N=scales, **of_x)
        return product(x, codes, *shared, scales_N=scales)

    def inputs(self, name: str, rows: int) -> Tensor | Rows8:
        """Random rows, as the product with a weight takes them."""
        x = random(rows, SHAPES[name][1])
        return quantize_rows(x) if self.eight and name != "head" else x

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
                self.multiply(name, 0, self.inputs(name, setting.rows), setting, gpu)
            except Exception as error:
                print(f"{name} {short(setting)}: {type(error).__name__} {str(error)[:120]}")

        if not distinct:
            return
        first, *rest = distinct.values()
        compile_one(first)  # alone: Triton sets itself up
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(compile_one, rest))
        torch.cuda.synchronize()

    def check(self, cases: Iterable[tuple[str, int, Setting]]) -> set[tuple[str, Setting]]:
        """Returns the cases that failed; compiles all, in parallel."""
        cases = sorted(set(cases), key=repr)
        for name, _, setting in cases:
            self.scratch.reserve(setting, SHAPES[name][0])
        self.compile((name, setting, self.gpu) for name, _, setting in cases)
        inputs: dict[tuple[str, int], tuple[Tensor | Rows8, Tensor]] = {}
        for name, rows, _ in cases:
            if (name, rows) not in inputs:
                x = self.inputs(name, rows)
                wide = x.widened() if isinstance(x, Rows8) else x.float()
                inputs[name, rows] = x, wide @ self.weights[name][-1].float().T
        return {(n, s) for n, rows, s in cases if not self.right(n, s, *inputs[n, rows])}

    def right(self, name: str, setting: Setting, x: Tensor | Rows8, expected: Tensor) -> bool:
        if setting.gated:
            gate, up = expected.chunk(2, dim=1)
            expected = F.silu(gate) * up
        try:
            torch.full(expected.shape, float("nan"), dtype=torch.bfloat16, device="cuda")  # poison
            y = self.multiply(name, -1, x, setting, self.gpu)
            off = (y.float() - expected).abs().max() / expected.abs().max()
            again = self.multiply(name, -1, x, setting, self.gpu)
            fine = bool(off <= 2 * ROUNDING) and torch.equal(y, again)
        except Exception as error:
            print(f"{name} {short(setting)}: {type(error).__name__} {str(error)[:120]}")
            return False
        if not fine:
            print(f"WRONG {name} rows {x.shape[0]} {short(setting)}: off by {float(off):.2g}")
        return fine

    # === times ===

    def product_us(self, name: str, rows: int, setting: Setting | None) -> float:
        x = random(rows, SHAPES[name][1]) if setting is None else self.inputs(name, rows)
        copies = len(self.weights[name])
        launches = [lambda i=i: self.multiply(name, i, x, setting, self.gpu) for i in range(copies)]
        return graph_us(launches, 2, BUDGET_US)

    def calibrate(self) -> None:
        """Sets how long the stand-in of attention takes."""
        x = random(1, SHAPES["qkv"][0])

        def us(turns: int) -> float:
            self.turns = turns
            return graph_us([lambda: self.attention(x, self.no_pdl)], 16, BUDGET_US)

        none, many = us(0), us(4000)
        self.turns = max(0, round(4000 * (ATTENTION_US - none) / (many - none)))

    def attention(self, qkv: Tensor, gpu: Gpu) -> Tensor:
        rows = qkv.shape[0]
        programs = 64 if rows <= 8 else 8
        width = SHAPES["o"][1]
        y = torch.empty((rows, width), device="cuda", dtype=qkv.dtype)
        sizes = {"IN": qkv.shape[1], "OUT": width, "BLOCK": width // programs}
        gpu.run(standin, (rows, programs), qkv, y, self.turns, warps=4, **sizes)
        return y

    def rope(self, qkv: Tensor, gpu: Gpu) -> None:
        width = qkv.shape[1]
        sizes = {"IN": width, "OUT": width, "BLOCK": 128}
        gpu.run(standin, (qkv.shape[0], width // 128), qkv, qkv, 0, warps=1, **sizes)

    def layer_us(self, rows: int, choice: Choice, pdl: bool = True, without: str = "") -> float:
        """Microseconds a layer; `without` one of the products, that is computed but once."""
        gpu = self.gpu if pdl else self.no_pdl
        norm, silu_mul, quantize = TritonRmsNorm(gpu), TritonSiluMul(gpu), TritonQuantizeRows(gpu)
        add_norm = norm.add_rms_norm_8 if self.eight else norm.add_rms_norm
        start, residual, wide = random(rows, WIDTH), random(rows, WIDTH), random(rows, MLP_WIDTH)
        kept: dict[str, Tensor] = {}

        def product_of(name: str, i: int, x: Tensor | Rows8) -> Tensor:
            if isinstance(x, Rows8) and choice[name] is None:
                x = start if name != "down" else wide  # cuBLAS multiplies 16 bits
            if name != without:
                return self.multiply(name, i, x, choice[name], gpu)
            if name not in kept:
                kept[name] = self.multiply(name, i, x, choice[name], gpu)
            return kept[name]

        gate_up = choice["gate_up"]
        gated = gate_up is not None and gate_up.gated

        def layers() -> None:
            x, r = start, residual
            for i in range(LAYERS):
                h, r = add_norm(x, r, self.norm, EPS)
                qkv = product_of("qkv", i, h)
                self.rope(qkv, gpu)
                a = self.attention(qkv, gpu)
                x = product_of("o", i, quantize(a) if self.eight else a)
                h, r = add_norm(x, r, self.norm, EPS)
                act = product_of("gate_up", i, h)
                if not gated:
                    act = silu_mul.rows8(act) if self.eight else silu_mul(act)
                x = product_of("down", i, act)

        return graph_us([layers], 1, 2 * BUDGET_US) / LAYERS


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def coded(weight: Tensor, weights: str) -> tuple[Tensor, Tensor]:
    """A weight in numbers of 8 bits, `fp8` or `int8`, and the scale of each row."""
    dtype, most = (torch.float8_e4m3fn, 448.0) if weights == "fp8" else (torch.int8, 127.0)
    scales = weight.abs().amax(1).float() / most
    codes = weight.float() / scales[:, None]
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scales


def grouped(weight: Tensor) -> CodedWeight:
    """A weight in integers of four bits, a scale for each 128 inputs."""
    parted = weight.float().view(weight.shape[0], -1, 128)
    scales = parted.abs().amax(2) / 7
    numbers = (parted / scales.unsqueeze(2)).round().add(8).to(torch.uint8).flatten(1)
    zeros = torch.full_like(scales, 8.0)
    return CodedWeight(
        Kind.INT4, pack_halves(numbers), scales.half().float(), 128, weight.shape[1], zeros
    )


# Weights that are multiplied by `groups`.
FOUR_BITS: dict[str, Callable[[Tensor], CodedWeight]] = {
    "int4": grouped,
    "nf4": partial(quantize, "nf4"),
}


# The table of each kind of coded weights, whose buckets up to `ROWS_MAX` are those of 16 bits.
CODED_SETTINGS: dict[str, Callable[[int, int], tuple[Setting | None, ...]]] = {
    "fp8": best_channels,
    "int8": best,
    "int4": best_groups,
    "nf4": best_values,
}


def short(setting: Setting | None) -> str:
    if setting is None:
        return "cuBLAS"
    kind = "vector" if setting.rows == 1 else "tiles"
    text = f"{kind} n{setting.block_n} k{setting.block_k} st{setting.stages} w{setting.warps}"
    text += f" split{setting.split}" if setting.split > 1 else ""
    text += f" ask{setting.prefetch}" if setting.prefetch else ""
    for name in ("swap", "gated", "ahead", "late"):
        text += f" {name}" if getattr(setting, name) else ""
    return text


def limit_us(name: str) -> float:
    return SHAPES[name][0] * SHAPES[name][1] * WEIGHT_BYTES[name] / BYTES_PER_SECOND * 1e6


Ranked = dict[tuple[str, int], list[Setting]]


def alone(
    bench: Bench, rows_all: list[int], failed: set[tuple[str, Setting]]
) -> tuple[Ranked, list]:
    """Each product by itself; returns the settings of each, best first."""
    ranked: Ranked = {}
    figures = []
    print("\nweight   rows  limit  cuBLAS (share)    ours (share)  settings, best first")
    for name in SHAPES:
        for rows in rows_all:
            limit, cublas = limit_us(name), bench.product_us(name, rows, None)
            settings = [s for s in bench.candidates(name, rows) if (name, s) not in failed]
            timed = sorted((bench.product_us(name, rows, s), repr(s), s) for s in settings)
            ranked[name, rows] = [s for *_, s in timed]
            figures += [(name, rows, short(s), us) for us, _, s in timed]
            figures.append((name, rows, "cuBLAS", cublas))
            if timed:
                tops = ", ".join(f"{us:.1f} {short(s)}" for us, _, s in timed[:3])
                some = next(((us, s) for us, _, s in timed if s.gated), None)
                tops += f"; gated: {some[0]:.1f} {short(some[1])}" if some else ""
                us = timed[0][0]
                print(
                    f"{name:8} {rows:4} {limit:6.1f} {cublas:7.1f} ({limit / cublas:.2f})"
                    f" {us:7.1f} ({limit / us:.2f})  {tops}",
                    flush=True,
                )
    return ranked, figures


def overlaps(setting: Setting) -> list[Setting]:
    """The setting with each way to overlap with the kernels before and after it."""
    made = [
        replace(setting, late=late, ahead=ahead, prefetch=0)
        for late in (False, True)
        for ahead in (False, True)
    ]
    if setting.rows > 1:
        made += [replace(setting, late=True, prefetch=kib) for kib in (16, 64)]
    return made


def finalists(settings: list[Setting]) -> list[Setting | None]:
    """What is tried in the chain, of settings from best to worst alone; None is cuBLAS."""
    tried = settings[:FINALISTS]
    tried += [s for s in settings if s.gated and s not in tried][:1]
    made: list[Setting | None] = [None, *tried]
    for setting in tried[:BASE]:
        made += [s for s in overlaps(setting) if s not in made]
    return made


CHAINED = ("gate_up", "down", "qkv", "o")  # in the order in which they are settled


def table(bench: Bench, rows: int) -> Choice:
    """What the table of settings says of the bench's weights."""
    if rows > ROWS_MAX:
        return dict.fromkeys(CHAINED)
    if bench.weights_are != "bfloat16":
        of_codes = CODED_SETTINGS[bench.weights_are]
        return {name: of_codes(*SHAPES[name])[bucket_of(rows)] for name in CHAINED}
    found: Choice = {name: best(*SHAPES[name])[bucket_of(rows)] for name in CHAINED}
    outputs, inputs = SHAPES["gate_up"]
    gated = best_gated(outputs // 2, inputs)[bucket_of(rows)]
    return found if gated is None else found | {"gate_up": gated}


def tabled(bench: Bench, rows_all: list[int]) -> Ranked:
    """The table's settings, and a few others where it names none, as `alone` ranks them."""
    ranked: Ranked = {}
    for rows in rows_all:
        for name, setting in table(bench, rows).items():
            others = [s for s in bench.candidates(name, rows) if s.swap and not s.gated]
            ranked[name, rows] = others[:FINALISTS] if setting is None else [setting]
    return ranked


def together(bench: Bench, ranked: Ranked, rows_all: list[int]) -> tuple[list, dict[int, Choice]]:
    """Microseconds a layer; settles each product's setting beside the others.

    Returns: the figures, and the choice for each number of rows.
    """
    bench.calibrate()
    tried = {key: finalists(settings) for key, settings in ranked.items() if key[0] in CHAINED}
    cases = [(name, rows, s) for (name, rows), some in tried.items() for s in some]
    cases += [(name, rows, s) for rows in rows_all for name, s in table(bench, rows).items()]
    failed = bench.check((name, rows, s) for name, rows, s in cases if s is not None)
    tried = {
        (name, rows): [s for s in some if (name, s) not in failed]
        for (name, rows), some in tried.items()
    }
    print(f"{len(set(cases))} more cases, {len(failed)} wrong")
    limit = sum(limit_us(name) for name in CHAINED)
    figures = []
    chosen: dict[int, Choice] = {}

    def us_of(rows: int, what: str, choice: Choice, **how: Any) -> float:
        try:
            us = bench.layer_us(rows, choice, **how)
        except Exception as error:
            print(f"{what}: {type(error).__name__} {str(error)[:80]}")
            return float("inf")
        figures.append((rows, what, us))
        return us

    print(f"\nus a layer (weights alone {limit:.1f}; attention is {ATTENTION_US} us of latency)")
    for rows in rows_all:
        cublas = us_of(rows, "cuBLAS", dict.fromkeys(CHAINED))
        known = us_of(rows, "the table's", table(bench, rows))
        choice: Choice = {name: ranked[name, rows][0] for name in CHAINED}
        begun = us_of(rows, "best alone", choice)
        print(f"rows {rows}: cuBLAS {cublas:.1f}, the table's {known:.1f}, best alone {begun:.1f}")
        for turn in range(2):
            for name in CHAINED:
                some = tried[name, rows]
                timed = sorted(
                    (us_of(rows, f"{name} {short(s)}", choice | {name: s}), i)
                    for i, s in enumerate(some)
                )
                choice[name] = some[timed[0][1]]
                tried[name, rows] = [some[i] for _, i in timed[:AGAIN]]
                tops = ", ".join(
                    f"{us:.1f} {short(some[i])}" for us, i in timed[: 3 if turn else 6]
                )
                print(f"  {name:8} {tops}", flush=True)
        final = us_of(rows, "chosen", choice)
        shares = {n: final - us_of(rows, f"without {n}", choice, without=n) for n in CHAINED}
        print(f"  chosen {final:.1f}; without PDL {us_of(rows, 'no PDL', choice, pdl=False):.1f}")
        print(
            "  of it: " + ", ".join(f"{n} {us:.1f} ({limit_us(n):.1f})" for n, us in shares.items())
        )
        for name in CHAINED:
            print(f"    {name}: {choice[name]}")
        chosen[rows] = choice
    return figures, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--ranks", type=int, default=1, help="whose share of the weights to take")
    parser.add_argument(
        "--weights", choices=["bfloat16", "fp8", "int8", "int4", "nf4"], default="bfloat16"
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--alone", action="store_true", help="no chain of layers")
    parts.add_argument(
        "--chain", action="store_true", help="only the chain, from the table's settings on"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    SHAPES.update(shapes(args.ranks))
    began = time.perf_counter()
    if args.weights != "bfloat16":
        WEIGHT_BYTES.update(dict.fromkeys(CHAINED, 0.53 if args.weights in FOUR_BITS else 1))
    bench = Bench(args.weights)
    if args.chain:
        ranked, products = tabled(bench, args.rows), []
    else:
        cases = [(n, r, s) for r in args.rows for n in SHAPES for s in bench.candidates(n, r)]
        failed = bench.check(cases)
        print(f"{len(set(cases))} cases, {len(failed)} wrong; {time.perf_counter() - began:.1f} s")
        ranked, products = alone(bench, args.rows, failed)
    print(f"{time.perf_counter() - began:.1f} s")
    layers, chosen = ([], {}) if args.alone else together(bench, ranked, args.rows)
    for rows in chosen:
        if ("head", rows) in ranked:
            chosen[rows] |= {"head": next(iter(ranked["head", rows]), None)}
            print(f"head {rows}: {chosen[rows]['head']}")
    if args.json:
        settings = {
            rows: {name: made and asdict(made) for name, made in choice.items()}
            for rows, choice in chosen.items()
        }
        found = {"products": products, "layers": layers, "chosen": settings}
        args.json.write_text(json.dumps(found))
    print(f"{time.perf_counter() - began:.1f} s in all")


if __name__ == "__main__":
    main()

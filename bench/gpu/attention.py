"""Attention of one layer: in a chain of layers, alone beside FlashAttention-3, and of prompts.

    PYTHONPATH=server python3 bench/gpu/attention.py [--only chain alone prefill] [--quick]
    ... --only alone --kv fp8_e4m3fn --batches "64 x 576" "32 x 8k"     codes of eight bits
    ... --only chain --settings 64,2,3,4 32,2,3,8       tile, warps, stages, programs[, least]

Chain: what attention adds, in a graph, to the products before and after it; as two launches (the
rotation and the write to the cache, then attention) and as one, by setting. What both write to the
cache must have the same bits; a ~ says that their outputs do not. What it names as fastest belongs
into `default_configs`.

Heads are those of Llama-3.1-8B (32 of queries, 8 of keys, of 128 numbers), in bfloat16, blocks of
16 tokens in a shuffled pool. Every way is first compared with the reference in float32. Decode is
microseconds a layer in a graph over pools that are not in the cache, the balancing kernel's share
(one launch a step) apart; prefill is a prompt from position 0 and its TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import triton
from measure import BYTES_PER_SECOND, copies_for, graph_us
from torch import Tensor

from headrace.ops.base import OpSpec
from headrace.ops.matmul.cuda import CudaMatmul
from headrace.ops.paged_attention import StepShape, fa3
from headrace.ops.paged_attention.reference import ReferenceAttention
from headrace.ops.paged_attention.triton_decode import (
    Configs,
    DecodeConfig,
    DecodePlan,
    TritonDecode,
)
from headrace.ops.paged_attention.triton_prefill import PrefillConfig, TritonPrefill
from headrace.ops.rope.base import QkvLayout
from headrace.ops.rope.triton import triton_rope_and_kv_write
from headrace.ops.triton import Gpu, gpu_at

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
DTYPE = torch.bfloat16
CELL_BYTES = 2 * KV_HEADS * HEAD_DIM * 2
LAYERS = 8  # at least as many as are in a graph, so that launches overlap as in a step
LAYERS_MAX = 40
FLOPS_PER_SECOND = 790e12
ROUNDING = 1.6e-2  # of the largest value

BATCHES = {
    "1 x 576": [576],
    "8 x 576": [576] * 8,
    "16 x 576": [576] * 16,
    "24 x 576": [576] * 24,
    "32 x 576": [576] * 32,
    "48 x 576": [576] * 48,
    "64 x 576": [576] * 64,
    "128 x 576": [576] * 128,
    "256 x 576": [576] * 256,
    "32 x 64-1k": [64 + 31 * i for i in range(32)],
    "32 x 2k": [2048] * 32,
    "64 x 2k": [2048] * 64,
    "8 x 8k": [8192] * 8,
    "32 x 8k": [8192] * 32,
    "16 x 32k": [32768] * 16,
    "63 x 500 + 32k": [500] * 63 + [32768],
}
CONFIGS = [
    DecodeConfig(tile=64, warps=2, stages=3, programs=4),
    DecodeConfig(tile=64, warps=2, stages=3, programs=2),
    DecodeConfig(tile=64, warps=2, stages=3, programs=8),
    DecodeConfig(tile=64, warps=2, stages=5, programs=3),
    DecodeConfig(tile=64, warps=4, stages=3, programs=4),
    DecodeConfig(tile=32, warps=2, stages=3, programs=6),
    DecodeConfig(tile=128, warps=4, stages=3, programs=3),
]
# Of caches of eight bits: a tile of as many bytes has twice the positions.
CODE_CONFIGS = [
    CONFIGS[0],
    DecodeConfig(tile=64, warps=2, stages=5, programs=4),
    DecodeConfig(tile=64, warps=4, stages=3, programs=4),
    DecodeConfig(tile=128, warps=2, stages=3, programs=4),
    DecodeConfig(tile=128, warps=4, stages=3, programs=4),
    DecodeConfig(tile=128, warps=4, stages=3, programs=3),
    DecodeConfig(tile=128, warps=8, stages=3, programs=2),
]
KV_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
WIDTH = 4096
CHAINED = ("1 x 576", "8 x 576", "32 x 576", "64 x 576", "128 x 576", "256 x 576", "8 x 8k")
CHAIN_LAYERS = 4  # Weights of 84 MB a layer put everything else out of the cache.
CHAIN_ROUNDS = 2
CHAIN_CONFIGS = [
    DecodeConfig(tile=64, warps=2, stages=3, programs=4),
    DecodeConfig(tile=64, warps=2, stages=3, programs=4, least=2),
    DecodeConfig(tile=64, warps=2, stages=5, programs=3),
    DecodeConfig(tile=64, warps=4, stages=3, programs=4),
    DecodeConfig(tile=32, warps=2, stages=3, programs=6),
    DecodeConfig(tile=128, warps=4, stages=3, programs=3),
]
PREFILLS = [
    PrefillConfig(queries=128, tile=64, warps=8, stages=3),
    PrefillConfig(queries=64, tile=64, warps=4, stages=3),
    PrefillConfig(queries=128, tile=128, warps=8, stages=2),
]
PROMPTS = (512, 2048, 8192)


@dataclass(frozen=True)
class Pools:
    """Caches of several layers and a step's rows over them."""

    caches: list[tuple[Tensor, Tensor]]
    shape: StepShape
    q_THE: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=("chain", "alone", "prefill"))
    parser.add_argument("--quick", action="store_true", help="the default setting only")
    parser.add_argument("--kv", choices=KV_DTYPES, help="codes that caches keep, with alone")
    parser.add_argument("--batches", nargs="+", choices=BATCHES, metavar="NAME")
    parser.add_argument("--settings", nargs="+", type=setting, metavar="NUMBERS", help="of decode")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    parts = arguments.only or ["chain", "alone", "prefill"]
    kv_dtype = KV_DTYPES.get(arguments.kv, DTYPE)
    if arguments.kv is not None and parts != ["alone"]:
        parser.error("--kv is measured with --only alone")
    torch.manual_seed(0)
    gpu = gpu_at(torch.device("cuda", 0))
    results: dict[str, dict[str, str]] = {}
    if "chain" in parts:
        chained = arguments.settings or (CHAIN_CONFIGS[:2] if arguments.quick else CHAIN_CONFIGS)
        results |= measure_chains(gpu, chained, arguments.batches or list(CHAINED))
    refusal = fa3.why_not(OpSpec(HEADS, KV_HEADS, HEAD_DIM, DTYPE, 1e-5), gpu.capability)
    if refusal is not None:
        print("no FlashAttention-3:", refusal)
    alone = arguments.settings or (CONFIGS if arguments.kv is None else CODE_CONFIGS)
    configs = (alone[:1] if arguments.quick else alone) if "alone" in parts else []
    prefills = (PREFILLS[:1] if arguments.quick else PREFILLS) if "prefill" in parts else []
    decodes = {config: make_decode(gpu, config) for config in configs}
    flash = fa3.Fa3Prefill(HEAD_DIM) if refusal is None and arguments.kv is None else None
    compile_all(gpu, decodes, prefills, kv_dtype)
    table: dict[str, dict[str, str]] = {}
    if decodes:
        batches = arguments.batches or list(BATCHES)
        table |= {name: decode_row(name, decodes, flash, kv_dtype) for name in batches}
    if prefills:
        table |= {f"prefill {n}": prefill_row(n, gpu, prefills, flash) for n in PROMPTS}
    if table:
        report(table, configs, prefills)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results | table, indent=1))


def setting(text: str) -> DecodeConfig:
    """A setting by its numbers."""
    return DecodeConfig(*map(int, text.split(",")))


class Chain:
    """Layers of a product, attention and a product, over caches of their own."""

    def __init__(self, gpu: Gpu, name: str) -> None:
        self.lengths = BATCHES[name]
        self.rows = len(self.lengths)
        self.pools = make_pools(self.lengths, [1] * self.rows, CHAIN_LAYERS)
        self.layout = QkvLayout(HEADS, KV_HEADS, HEAD_DIM)
        self._matmul = CudaMatmul(gpu)
        self._rope = triton_rope_and_kv_write(gpu)
        scale = math.sqrt(WIDTH)
        self._qkv, self._out = (
            self._matmul.pack(torch.randn((y, WIDTH), device="cuda", dtype=DTYPE) / scale)
            for y in (self.layout.columns, WIDTH)
        )
        self._x_SD = torch.randn((self.rows, WIDTH), device="cuda", dtype=DTYPE)
        angles = torch.rand((self.rows, HEAD_DIM // 2), device="cuda") * 6
        self.cos_sin_SE = torch.cat((angles.cos(), angles.sin()), 1)
        last = torch.tensor(self.lengths, device="cuda") - 1
        table_SB = self.pools.shape.table_SB.long()
        block_S = table_SB.gather(1, (last // BLOCK)[:, None])[:, 0]
        self.cells_S = block_S * BLOCK + last % BLOCK

    def us(self, attend: Callable[[Tensor, int], Tensor]) -> float:
        """Microseconds a layer with this attention, which gets the projection and the layer."""

        def layer(index: int) -> None:
            o_SHE = attend(self._matmul.apply(self._x_SD, self._qkv, None), index)
            self._matmul.apply(o_SHE.view(self.rows, WIDTH), self._out, None)

        layers = [lambda index=index: layer(index) for index in range(CHAIN_LAYERS)]
        return graph_us(layers, CHAIN_ROUNDS, 6e3)

    def products_us(self) -> float:
        o_SD = torch.randn_like(self._x_SD)
        return self.us(lambda qkv_SC, index: o_SD)

    def two(self, made: TritonDecode) -> Callable[[Tensor, int], Tensor]:
        plan = self._plan(made)

        def attend(qkv_SC: Tensor, index: int) -> Tensor:
            caches = self.pools.caches[index]
            q_SHE = self._rope(qkv_SC, self.cos_sin_SE, *caches, self.cells_S, self.layout, None)
            o_SHE = torch.empty((self.rows, HEADS, HEAD_DIM), device="cuda", dtype=DTYPE)
            made.attend(q_SHE, *caches, o_SHE, plan)
            return o_SHE

        return attend

    def one(self, made: TritonDecode) -> Callable[[Tensor, int], Tensor]:
        plan = self._plan(made)

        def attend(qkv_SC: Tensor, index: int) -> Tensor:
            k_cache, v_cache = self.pools.caches[index]
            o_SHE = torch.empty((self.rows, HEADS, HEAD_DIM), device="cuda", dtype=DTYPE)
            made.rotate_and_attend(
                *(qkv_SC, self.cos_sin_SE, k_cache, v_cache, self.cells_S, o_SHE),
                *(self.layout, None, plan),
            )
            return o_SHE

        return attend

    def verdict(self, made: TritonDecode) -> str:
        """What to write before a figure: nothing, ~ or WRONG."""
        columns = (self.rows, self.layout.columns)
        qkv_SC = torch.randn(columns, device="cuda", dtype=DTYPE)
        cells = [cache.view(-1, KV_HEADS, HEAD_DIM) for cache in self.pools.caches[0]]
        outputs: list[list[Tensor]] = []
        for attend in (self.one(made), self.two(made)):
            for cell in cells:
                cell[self.cells_S] = torch.nan
            o_SHE = attend(qkv_SC.clone(), 0)
            outputs.append([o_SHE, *(cell[self.cells_S] for cell in cells)])
        ours, theirs = outputs
        q_SHE = self._rope(
            qkv_SC, self.cos_sin_SE, *self.pools.caches[0], self.cells_S, self.layout, None
        )
        rotated = Pools(self.pools.caches, self.pools.shape, q_SHE)
        if (
            not all(map(torch.equal, ours[1:], theirs[1:]))
            or wrong(ours[0], theirs[0].float())
            or wrong(picked(theirs[0], rotated), reference(rotated, 2))
        ):
            return "WRONG"
        return "" if torch.equal(ours[0], theirs[0]) else "~"

    def _plan(self, made: TritonDecode) -> DecodePlan:
        shape = self.pools.shape
        assert shape.kv_len_S is not None
        return made.plan(self.rows, shape.kv_len_S, shape.table_SB, BLOCK)


def chain_row(chain: Chain, decodes: dict[DecodeConfig, TritonDecode]) -> dict[str, str]:
    """What attention adds to a layer, by way."""
    plain = next(iter(decodes.values()))
    products_us = chain.products_us()

    def added(attend: Callable[[Tensor, int], Tensor]) -> str:
        return f"{chain.us(attend) - products_us:.1f}"

    def checked(made: TritonDecode) -> str:
        verdict = chain.verdict(made)
        return verdict if verdict == "WRONG" else verdict + added(chain.one(made))

    limit_us = sum(chain.lengths) * CELL_BYTES / BYTES_PER_SECOND * 1e6
    cells = {
        "limit": f"{limit_us:.1f}",
        "products": f"{products_us:.1f}",
        "two launches": guarded(lambda: added(chain.two(plain))),
    }
    for config, made in decodes.items():
        cells[label(config)] = guarded(lambda made=made: checked(made))
    return cells


def measure_chains(
    gpu: Gpu, configs: list[DecodeConfig], batches: list[str]
) -> dict[str, dict[str, str]]:
    """Prints and returns what attention adds to a layer, by setting and batch."""
    decodes = {config: make_decode(gpu, config) for config in configs}
    warm = Chain(gpu, batches[0])
    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(warm.verdict, made) for made in decodes.values()]:
            error = future.exception()
            if error is not None:
                print("does not compile:", repr(error)[:300])
    table = {name: chain_row(Chain(gpu, name), decodes) for name in batches}
    print("us that attention adds to a layer, in a chain with products")
    print(f"{'':24}" + "".join(f"{name:>11}" for name in table))
    for row in table[batches[0]]:
        print(f"{row:24}" + "".join(f"{cells[row]:>11}" for cells in table.values()))
    names = {label(config): config for config in configs}
    for name, cells in table.items():
        figures = {key: us.lstrip("~") for key, us in cells.items() if key in names}
        times = {float(us): key for key, us in figures.items() if us[0].isdigit()}
        if times:
            print(f"{name}: fastest {names[times[min(times)]]}")
    return {f"chain {name}": cells for name, cells in table.items()}


def make_decode(gpu: Gpu, config: DecodeConfig) -> TritonDecode:
    device = torch.device("cuda")
    shape = HEADS, KV_HEADS, HEAD_DIM
    return TritonDecode(*shape, DTYPE, gpu, device, Configs((), config))


def compile_all(
    gpu: Gpu,
    decodes: dict[DecodeConfig, TritonDecode],
    prefills: list[PrefillConfig],
    kv_dtype: torch.dtype,
) -> None:
    """Compiles side by side: a kernel takes a second, and there are dozens."""
    small, prompt = make_pools([70], [1], 1, kv_dtype), make_pools([70], [70], 1)
    jobs: list[Callable[[], object]] = [
        lambda config=config: decode(decodes[config], small) for config in decodes
    ] + [lambda config=config: prefill(make_prefill(gpu, config), prompt) for config in prefills]
    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(job) for job in jobs]:
            error = future.exception()
            if error is not None:
                print("does not compile:", repr(error)[:300])


def make_pools(
    context_S: list[int], length_S: list[int], layers: int, kv_dtype: torch.dtype = DTYPE
) -> Pools:
    context, length = np.array(context_S, np.int32), np.array(length_S, np.int32)
    count = -(-context // BLOCK)
    blocks = int(count.sum()) + 1
    order = torch.randperm(blocks - 1).int() + 1
    table_SB = torch.zeros((len(context), int(count.max())), dtype=torch.int32)
    at = 0
    for row, mine in enumerate(count.tolist()):
        table_SB[row, :mine] = order[at : at + mine]
        at += mine
    pool = (blocks, BLOCK, KV_HEADS, HEAD_DIM)
    caches = [
        (
            torch.randn(pool, device="cuda", dtype=DTYPE).to(kv_dtype),
            torch.randn(pool, device="cuda", dtype=DTYPE).to(kv_dtype),
        )
        for _ in range(layers)
    ]
    first_S1 = np.concatenate(([0], np.cumsum(length))).astype(np.int32)
    shape = StepShape(
        context - length,
        length,
        table_SB.cuda(),
        BLOCK,
        kv_len_S=torch.from_numpy(context).cuda(),
        first_S1=torch.from_numpy(first_S1).cuda(),
    )
    tokens = int(length.sum())
    q_THE = torch.randn((tokens, HEADS, HEAD_DIM), device="cuda", dtype=DTYPE)
    return Pools(caches, shape, q_THE)


def empty_output(pools: Pools) -> Tensor:
    return torch.full_like(pools.q_THE, torch.nan)


def decode(made: TritonDecode, pools: Pools) -> Tensor:
    assert pools.shape.kv_len_S is not None
    o_THE = empty_output(pools)
    rows = len(pools.shape.row_len_S)
    plan = made.plan(rows, pools.shape.kv_len_S, pools.shape.table_SB, BLOCK)
    made.attend(pools.q_THE, *pools.caches[0], o_THE, plan)
    return o_THE


def make_prefill(gpu: Gpu, config: PrefillConfig) -> TritonPrefill:
    return TritonPrefill(HEADS, KV_HEADS, HEAD_DIM, DTYPE, gpu, config)


def prefill(
    made: TritonPrefill | fa3.Fa3Prefill, pools: Pools, fresh: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    o_THE = empty_output(pools)
    made.attend(pools.q_THE, *pools.caches[0], o_THE, made.plan(pools.shape), fresh=fresh)
    return o_THE


def wrong(actual: Tensor, expected: Tensor) -> bool:
    error = float((actual.float() - expected).abs().max() / expected.abs().max())
    return not error < ROUNDING


def reference(pools: Pools, rows: int) -> Tensor:
    """The first and the last rows' outputs in float32; all take long where contexts do."""
    shape, (k, v) = pools.shape, [cache.to(DTYPE) for cache in pools.caches[0]]
    picked = sorted({0, len(shape.row_len_S) - 1})[:rows]
    outputs: list[Tensor] = []
    for row in picked:
        one = slice(row, row + 1)
        part = StepShape(shape.row_start_S[one], shape.row_len_S[one], shape.table_SB[one], BLOCK)
        assert (shape.row_len_S == 1).all() or len(shape.row_len_S) == 1
        q_THE = pools.q_THE[row : row + int(shape.row_len_S[row])]
        outputs.append(ReferenceAttention().attend(q_THE.float(), k, v, part))
    return torch.cat(outputs)


def picked(output: Tensor, pools: Pools) -> Tensor:
    if len(pools.shape.row_len_S) == 1:
        return output
    return output[[0, -1]]


def decode_row(
    name: str,
    decodes: dict[DecodeConfig, TritonDecode],
    flash: fa3.Fa3Prefill | None,
    kv_dtype: torch.dtype,
) -> dict[str, str]:
    lengths = BATCHES[name]
    bytes_each = sum(lengths) * CELL_BYTES * kv_dtype.itemsize // DTYPE.itemsize
    layers = max(2, copies_for(bytes_each, LAYERS_MAX))
    pools = make_pools(lengths, [1] * len(lengths), layers, kv_dtype)
    expected = reference(pools, 2)
    rounds = max(1, LAYERS // layers)
    limit_us = bytes_each / BYTES_PER_SECOND * 1e6
    budget_us = min(60e3, max(8e3, 20 * limit_us))
    cells = {"limit": f"{limit_us:.1f}"}
    q_THE, shape = pools.q_THE, pools.shape
    o_THE = torch.empty_like(q_THE)
    rows = len(lengths)

    def measured(attend: Callable[[Tensor, Tensor], object], output: Tensor) -> str:
        if wrong(picked(output, pools), expected):
            return "WRONG"
        launches = [lambda k=k, v=v: attend(k, v) for k, v in pools.caches]
        us = graph_us(launches, rounds, budget_us)
        return f"{us:.1f} ({limit_us / us:.2f})"

    if flash is not None:
        plan = flash.plan(shape)
        cells["fa3"] = guarded(
            lambda: measured(
                lambda k, v: flash.attend(q_THE, k, v, o_THE, plan), prefill(flash, pools)
            )
        )
    for config, made in decodes.items():
        assert shape.kv_len_S is not None
        plan = made.plan(rows, shape.kv_len_S, shape.table_SB, BLOCK)
        cells[label(config)] = guarded(
            lambda made=made, plan=plan: measured(
                lambda k, v: made.attend(q_THE, k, v, o_THE, plan), decode(made, pools)
            )
        )
    made, plan = next(
        (d, d.plan(rows, shape.kv_len_S, shape.table_SB, BLOCK)) for d in decodes.values()
    )
    cells["balance"] = guarded(lambda: f"{graph_us([lambda: made.replan(plan)], 8, 2e3):.1f}")
    return cells


def prefill_row(
    tokens: int, gpu: Gpu, prefills: list[PrefillConfig], flash: fa3.Fa3Prefill | None
) -> dict[str, str]:
    pools = make_pools([tokens], [tokens], 2)
    expected = reference(pools, 1) if tokens <= 2048 else None
    cells_L = (
        pools.shape.table_SB[0].long()[:, None] * BLOCK + torch.arange(BLOCK).cuda()
    ).flatten()
    fresh = tuple(cache.flatten(0, 1)[cells_L] for cache in pools.caches[0])
    flops = 2.0 * tokens * tokens * HEADS * HEAD_DIM
    o_THE = torch.empty_like(pools.q_THE)
    results = {"limit": f"{flops / FLOPS_PER_SECOND * 1e6:.0f}"}

    def measured(made: TritonPrefill | fa3.Fa3Prefill, fresh: tuple[Tensor, Tensor] | None) -> str:
        if expected is not None and wrong(prefill(made, pools, fresh), expected):
            return "WRONG"
        plan, caches = made.plan(pools.shape), pools.caches[0]
        us = graph_us([lambda: made.attend(pools.q_THE, *caches, o_THE, plan, fresh=fresh)], 4, 8e3)
        return f"{us:.0f} ({flops / us / 1e6:.0f})"

    if flash is not None:
        results["fa3 fresh"] = guarded(lambda: measured(flash, (fresh[0], fresh[1])))
        results["fa3 paged"] = guarded(lambda: measured(flash, None))
    for config in prefills:
        made = make_prefill(gpu, config)
        results[label(config)] = guarded(lambda made=made: measured(made, None))
    return results


def guarded(measure: Callable[[], str]) -> str:
    """What fails is told and does not end the others."""
    try:
        return measure()
    except (RuntimeError, ValueError, TypeError, AssertionError, triton.TritonError) as error:
        print("failed:", repr(error)[:300])
        return "failed"


def label(config: DecodeConfig | PrefillConfig) -> str:
    if isinstance(config, PrefillConfig):
        return f"{config.queries}x{config.tile} {config.warps}w {config.stages}s"
    rest = f" {config.least}l" if config.least > 1 else ""
    return f"{config.tile}t {config.warps}w {config.stages}s {config.programs}p{rest}"


def report(
    table: dict[str, dict[str, str]], configs: list[DecodeConfig], prefills: list[PrefillConfig]
) -> None:
    decode_columns = ["limit", "fa3", *map(label, configs), "balance"]
    prefill_columns = ["limit", "fa3 fresh", "fa3 paged", *map(label, prefills)]
    print("decode, us a layer (share of 4.19 TB/s); prefill, us a layer (TFLOP/s)")
    for kind, columns in (("", decode_columns), ("prefill", prefill_columns)):
        print(f"{'':16}" + "".join(f"{column:>15}" for column in columns))
        for name, cells in table.items():
            if name.startswith("prefill") == (kind == "prefill"):
                print(f"{name:16}" + "".join(f"{cells.get(column, '-'):>15}" for column in columns))


if __name__ == "__main__":
    main()

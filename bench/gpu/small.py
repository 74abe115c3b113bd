"""The small Triton kernels at the widths of Llama-3.1-8B, beside their references in PyTorch.

    PYTHONPATH=server python3 bench/gpu/small.py [--rows 1 64 2048] [--json OUT]

First each is compared with its reference on fresh random inputs. Then microseconds a launch, as the
median replay of a graph of 32 launches over rotating buffers; `default` marks the settings that the
server takes. Last, what programmatic dependent launch gives in the chain of a layer's small
kernels, without the matrix products between them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measure import BYTES_PER_SECOND, copies_for, graph_us
from torch import Tensor

from headrace.layers.rotary import RopeSpec, Rotary
from headrace.ops.decode_inputs import reference as decode_inputs_reference
from headrace.ops.decode_inputs.triton import TritonDecodeInputs
from headrace.ops.rms_norm import reference as rms_norm_reference
from headrace.ops.rms_norm import triton as rms_norm
from headrace.ops.rope import QkvLayout
from headrace.ops.rope import reference as rope_reference
from headrace.ops.rope import triton as rope
from headrace.ops.silu_mul import reference as silu_mul_reference
from headrace.ops.silu_mul import triton as silu_mul
from headrace.ops.triton import Gpu, gpu_at

WIDTH, MLP_WIDTH, EPS = 4096, 14336, 1e-5
LAYOUT = QkvLayout(heads=32, kv_heads=8, head_dim=128)
BLOCK_TOKENS = 16
ROWS = [1, 8, 32, 64, 128, 256, 2048, 8192]
LAUNCHES = 32  # a graph
BUDGET_US = 6000.0  # a measurement
DTYPE = torch.bfloat16
ROUNDING = 2.0**-7  # of bfloat16

Launch = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One kernel at one number of rows."""

    op: str
    bytes: int  # read and written
    reference: Callable[[int], object]  # on the buffers of that number
    ours: Callable[[Gpu, int, object | None], object]  # likewise, with settings
    default: object
    settings: list[object]
    copies: int


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(DTYPE)


def norm_case(rows: int) -> Case:
    size = rows * WIDTH * 2
    copies = copies_for(4 * size, LAUNCHES)
    x, residual = ([random(rows, WIDTH) for _ in range(copies)] for _ in range(2))
    weight = random(WIDTH)

    def ours(gpu: Gpu, i: int, settings: object | None) -> Tensor:
        assert settings is None or isinstance(settings, rms_norm.Settings)
        return rms_norm.TritonRmsNorm(gpu).launch(x[i], residual[i], weight, EPS, settings)

    return Case(
        "add_rms_norm",
        4 * size,
        lambda i: rms_norm_reference.add_rms_norm(x[i], residual[i], weight, EPS),
        ours,
        rms_norm.Settings.best(rows, WIDTH),
        [rms_norm.Settings(warps) for warps in (2, 4, 8, 16)],
        copies,
    )


def rope_case(rows: int) -> Case:
    kv = 2 * LAYOUT.kv_heads * LAYOUT.head_dim
    size = rows * 2 * (LAYOUT.columns + (LAYOUT.columns - kv // 2) + kv)
    copies = copies_for(size, LAUNCHES)
    qkv = [random(rows, LAYOUT.columns) for _ in range(copies)]
    blocks = rows // BLOCK_TOKENS + 64
    caches = torch.empty(
        (copies, 2, blocks, BLOCK_TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim),
        device="cuda",
        dtype=DTYPE,
    )
    cells = torch.randperm(blocks * BLOCK_TOKENS, device="cuda")[:rows]
    cos_sin = rotary_table()[torch.randint(0, 8192, (rows,), device="cuda")]

    def ours(gpu: Gpu, i: int, settings: object | None) -> Tensor:
        assert settings is None or isinstance(settings, rope.Settings)
        return rope.TritonRope(gpu).rope_and_kv_write(
            qkv[i], cos_sin, caches[i, 0], caches[i, 1], cells, LAYOUT, None, settings
        )

    def reference(i: int) -> Tensor:
        return rope_reference.rope_and_kv_write(
            qkv[i], cos_sin, caches[i, 0], caches[i, 1], cells, LAYOUT, None
        )

    return Case(
        "rope_and_kv_write",
        size,
        reference,
        ours,
        rope.Settings.best(LAYOUT),
        [rope.Settings(*s) for s in ((2, 1), (4, 1), (8, 1), (8, 2), (8, 4))],
        copies,
    )


def silu_case(rows: int) -> Case:
    size = rows * MLP_WIDTH * 2 * 3
    copies = copies_for(size, LAUNCHES)
    gate_up = [random(rows, 2 * MLP_WIDTH) for _ in range(copies)]

    def ours(gpu: Gpu, i: int, settings: object | None) -> Tensor:
        assert settings is None or isinstance(settings, silu_mul.Settings)
        return silu_mul.TritonSiluMul(gpu)(gate_up[i], settings)

    return Case(
        "silu_mul",
        size,
        lambda i: silu_mul_reference.silu_mul(gate_up[i]),
        ours,
        silu_mul.Settings.best(rows),
        [silu_mul.Settings(*s) for s in ((512, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4))],
        copies,
    )


def decode_inputs_case(rows: int) -> Case:
    table = torch.randint(1, 2**20, (513, 512), device="cuda", dtype=torch.int32)
    last_token = torch.randint(0, 128256, (513,), device="cuda")
    slots = torch.randint(0, 512, (rows,), device="cuda")
    start = torch.randint(0, 8192, (rows,), device="cuda")
    given = (slots, start, last_token, table, rotary_table(), BLOCK_TOKENS)
    return Case(
        "decode_inputs",
        rows * (LAYOUT.head_dim * 8 + 56),
        lambda i: decode_inputs_reference.decode_inputs(*given),
        lambda gpu, i, settings: TritonDecodeInputs(gpu)(*given),
        None,
        [],
        1,
    )


_tables: list[Tensor] = []


def rotary_table() -> Tensor:
    """cos_sin_LE of 8192 positions, made once."""
    if not _tables:
        rotary = Rotary(RopeSpec(LAYOUT.head_dim, theta=500000.0)).cuda()
        _tables.append(rotary(torch.arange(8192, device="cuda")))
    return _tables[0]


def poison(like: Tensor) -> None:
    """Leaves NaN in the memory that the next tensor of this size will be given."""
    torch.full_like(like, torch.nan)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest, in roundings of the value (of 0.01 where that is nearer to zero)."""
    actual, expected = actual.float(), expected.float()
    if not bool(actual.isfinite().all()):
        return float("inf")
    return float(((actual - expected).abs() / expected.abs().clamp_min(0.01)).max() / ROUNDING)


def check(gpu: Gpu, rows: int) -> Iterator[tuple[str, float]]:
    """Yields (what, difference in roundings) of every kernel against float32 PyTorch."""
    x, residual, weight = random(rows, WIDTH), random(rows, WIDTH), random(WIDTH)
    total = (x.float() + residual.float()).to(DTYPE)
    expected = rms_norm_reference.rms_norm(total.float(), weight.float(), EPS)
    poison(x)
    y, stream = rms_norm.TritonRmsNorm(gpu).add_rms_norm(x, residual, weight, EPS)
    yield "norm", difference(y, expected)
    yield "sum", difference(stream, total)

    gate_up = random(rows, 2 * MLP_WIDTH) * 3
    poison(gate_up[:, :MLP_WIDTH])
    act = silu_mul.TritonSiluMul(gpu)(gate_up)
    yield "silu", difference(act, silu_mul_reference.silu_mul(gate_up.float()))

    qkv = random(rows, LAYOUT.columns)
    cos_sin = rotary_table()[torch.randint(0, 8192, (rows,), device="cuda")]
    blocks = rows // BLOCK_TOKENS + 2
    cells = torch.randperm(blocks * BLOCK_TOKENS, device="cuda")[:rows]
    shape = (2, blocks, BLOCK_TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim)
    wide = torch.zeros(shape, device="cuda")
    expected = rope_reference.rope_and_kv_write(
        qkv.float(), cos_sin, wide[0], wide[1], cells, LAYOUT, None
    )
    caches = torch.full(shape, torch.nan, device="cuda", dtype=DTYPE)
    q = rope.TritonRope(gpu).rope_and_kv_write(
        qkv, cos_sin, caches[0], caches[1], cells, LAYOUT, None
    )
    yield "queries", difference(q, expected)
    for name, i in (("keys", 0), ("values", 1)):
        actual, wanted = (c[i].flatten(0, 1)[cells] for c in (caches, wide))
        yield name, difference(actual, wanted)


def measure(case: Case, gpu: Gpu) -> dict[str, float]:
    """Microseconds a launch by variant; a variant that fails says so and is left out."""
    rounds = max(1, LAUNCHES // case.copies)

    def on_all(run: Callable[[int], object]) -> list[Launch]:
        return [lambda i=i: run(i) for i in range(case.copies)]

    variants = {
        "pytorch": on_all(case.reference),
        "no pdl": on_all(lambda i: case.ours(replace(gpu, pdl=False), i, None)),
        "default": on_all(lambda i: case.ours(gpu, i, None)),
    }
    for settings in case.settings:
        name = "/".join(str(v) for v in vars(settings).values())
        variants[name] = on_all(lambda i, s=settings: case.ours(gpu, i, s))
    times: dict[str, float] = {}
    for name, launches in variants.items():
        try:
            times[name] = graph_us(launches, rounds, BUDGET_US)
        except Exception as error:  # the other variants are still worth measuring
            print(f"{case.op} {name}: {type(error).__name__}: {str(error)[:200]}")
    return times


def chain_us(gpu: Gpu, rows: int) -> float:
    """Microseconds a launch of 32 times norm, rotation, activation, norm, one behind the other."""
    residual, weight = random(rows, WIDTH), random(WIDTH)
    x, gate_up = random(rows, WIDTH), random(rows, 2 * MLP_WIDTH)
    qkv = random(rows, LAYOUT.columns)
    shape = (2, rows // BLOCK_TOKENS + 1, BLOCK_TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim)
    caches = torch.zeros(shape, device="cuda", dtype=DTYPE)
    cells = torch.arange(rows, device="cuda")
    cos_sin = rotary_table()[:rows]
    norm, silu = rms_norm.TritonRmsNorm(gpu), silu_mul.TritonSiluMul(gpu)
    rotate = rope.TritonRope(gpu).rope_and_kv_write

    def layer() -> None:
        norm.add_rms_norm(x, residual, weight, EPS)
        rotate(qkv, cos_sin, caches[0], caches[1], cells, LAYOUT, None)
        silu(gate_up)
        norm.add_rms_norm(x, residual, weight, EPS)

    return graph_us([layer], 32, BUDGET_US) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    began = time.monotonic()
    gpu = gpu_at(torch.device("cuda", 0))
    with torch.inference_mode():
        worst = [f"{rows}: {what} {off:.2f}" for rows in (1, 64, 2047)
                 for what, off in check(gpu, rows)]  # fmt: skip
        print("largest difference from float32, in roundings of bfloat16:", ", ".join(worst))
        results = []
        for made in (norm_case, rope_case, silu_case, decode_inputs_case):
            for rows in args.rows:
                if made is decode_inputs_case and rows > 512:
                    continue
                case = made(rows)
                times = measure(case, gpu)
                share = case.bytes / BYTES_PER_SECOND / (min(times.values()) * 1e-6)
                results.append({"op": case.op, "rows": rows, "us": times, "share": share})
                told = "  ".join(f"{name} {us:.2f}" for name, us in times.items())
                print(f"{case.op:<18}{rows:>5}  {told}  best at {share:.2f} of memory")
        chains = {
            rows: [chain_us(replace(gpu, pdl=pdl), rows) for pdl in (False, True)]
            for rows in (1, 64)
        }
    for rows, (plain, pdl) in chains.items():
        print(f"chain, {rows} rows: {plain:.2f} us a launch, {pdl:.2f} with dependent launch")
    print(f"{time.monotonic() - began:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps({"ops": results, "chains": chains}, indent=1))


if __name__ == "__main__":
    main()

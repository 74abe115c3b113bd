"""Which kernel multiplies how many rows by which weight, as measured on an H200 or an H100.

`bench/gpu/gemm.py` measures what stands here.
"""

# N outputs · K inputs

from __future__ import annotations

from dataclasses import dataclass, replace

# Up to so many rows a kernel is recorded for; more rows are no longer bound by the weights alone.
BUCKETS = (1, 16, 32, 64)
ROWS_MAX = BUCKETS[-1]


@dataclass(frozen=True)
class Setting:
    """How `skinny.product` divides its work."""

    rows: int  # of a tile, those of the bucket; 1 are kernels without tensor cores
    block_n: int  # outputs a program
    block_k: int  # inputs a step of its loop
    stages: int  # steps whose loads are under way at once
    split: int = 1  # programs that share the sum over the inputs
    warps: int = 4  # a program
    swap: bool = False  # whether the outputs are the tensor cores' rows
    prefetch: int = 0  # KiB of weights a program asks for before it waits for the input
    late: bool = False  # whether dependents start when the sums are complete, not at once
    gated: bool = False  # whether the product ends in silu(gate) * up
    ahead: bool = False  # whether a step's weights are loaded before the wait for the input


# A single row: its weights are on their way in registers before it is known.
_ROW = Setting(1, 4, 2048, 1, ahead=True)
# Tiles run in several waves: dependents that start at once would take room from the later ones.
_TILE = Setting(16, 64, 128, 4, swap=True, prefetch=16, late=True)
_TILE_32 = replace(_TILE, rows=32)
_TILE_64 = replace(_TILE, rows=64, stages=3, prefetch=0)

# Of Llama-3.1-8B: (N, K) of a weight to the setting of each bucket, None for cuBLAS.
H200: dict[tuple[int, int], tuple[Setting | None, ...]] = {
    (6144, 4096): (
        replace(_ROW, late=True),
        replace(_TILE, stages=3, split=2, prefetch=0),
        replace(_TILE_32, stages=3, split=2),
        Setting(64, 32, 128, 4),
    ),
    (4096, 4096): (
        replace(_ROW, block_n=8, block_k=1024),
        replace(_TILE, split=4),
        replace(_TILE_32, split=4, prefetch=0, late=False),
        None,
    ),
    (28672, 4096): (
        replace(_ROW, block_n=2, block_k=4096, late=True),
        _TILE,
        _TILE_32,
        replace(_TILE_64, block_n=128, warps=8, late=False),
    ),
    (4096, 14336): (
        _ROW,
        replace(_TILE, split=4),
        replace(_TILE_32, split=4, prefetch=0),
        replace(_TILE_64, split=4),
    ),
    (128256, 4096): (
        _ROW,
        replace(_TILE, block_n=128, stages=3, warps=8, prefetch=0, late=False),
        replace(_TILE_32, stages=3, prefetch=0, late=False),
        replace(_TILE_64, block_n=128, warps=8, late=False),
    ),
    # Shares of one of two ranks, measured on an H100.
    (3072, 4096): (
        replace(_ROW, late=True),
        replace(_TILE, stages=3, split=4, prefetch=0, ahead=True),
        replace(_TILE_32, stages=3, split=4, prefetch=0, ahead=True),
        replace(_TILE_64, split=4, prefetch=16),
    ),
    (4096, 2048): (
        replace(_ROW, block_n=8, block_k=1024),
        Setting(16, 32, 256, 3, split=4, late=True, ahead=True),
        Setting(32, 32, 128, 4, split=4, prefetch=16, late=True),
        Setting(64, 32, 128, 4, split=2, prefetch=64, late=True),
    ),
    (14336, 4096): (_ROW, _TILE, _TILE_32, replace(_TILE_64, late=False)),
    (4096, 7168): (
        replace(_ROW, block_n=8, block_k=1024),
        replace(_TILE, split=4, prefetch=0, late=False),
        replace(_TILE_32, split=4, prefetch=0, late=False),
        Setting(64, 32, 128, 4, split=2, prefetch=16, late=True),
    ),
    (64128, 4096): (
        _ROW,
        replace(_TILE, block_k=256, stages=3, prefetch=0, late=False),
        replace(_TILE_32, block_n=128, stages=3, warps=8, prefetch=0, late=False),
        replace(_TILE_64, block_n=128, warps=8, late=False),
    ),
}

# Gate and up in one weight of 2 N rows, by (N, K): the product with the activation.
H200_GATED: dict[tuple[int, int], tuple[Setting | None, ...]] = {
    (14336, 4096): (None, None, None, Setting(64, 64, 64, 4, swap=True, gated=True)),
}

# Programs a device with 132 multiprocessors should have at least.
_PROGRAMS_MIN = 2 * 132


def bucket_of(rows: int) -> int:
    """The index of the smallest bucket that holds so many rows, which are at most `ROWS_MAX`."""
    return next(i for i, bucket in enumerate(BUCKETS) if rows <= bucket)


def best(outputs: int, inputs: int) -> tuple[Setting | None, ...]:
    """The setting of each bucket on a Hopper GPU; None where cuBLAS is the choice."""
    return H200.get((outputs, inputs)) or _by_rule(outputs, inputs)


def best_gated(outputs: int, inputs: int) -> tuple[Setting | None, ...]:
    """As `best`, of a product of `outputs` columns that ends in silu(gate) * up."""
    return H200_GATED.get((outputs, inputs)) or (None,) * len(BUCKETS)


def _by_rule(outputs: int, inputs: int) -> tuple[Setting | None, ...]:
    """For weights nobody has measured: what shapes like theirs do well with."""
    if outputs < 1024 or inputs < 1024 or inputs % 128 != 0:
        return (None,) * len(BUCKETS)
    split = 1
    while outputs // 64 * split < _PROGRAMS_MIN and inputs // split > 1024:
        split *= 2
    return (_ROW, replace(_TILE, split=split), replace(_TILE_32, split=split), None)

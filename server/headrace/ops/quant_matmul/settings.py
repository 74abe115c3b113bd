"""How products of few rows with coded weights are divided, as measured on an H100 and an H200.

`bench/gpu/gemm.py` measures what stands here, with `--weights int4`, `nf4` and `fp8`.
"""

# N outputs · K inputs

from __future__ import annotations

from dataclasses import replace

from headrace.ops.matmul.settings import Setting

# Of products with eight-bit floats: a bucket more than 16 bits have, because half the bytes and
# twice the speed of the tensor cores leave them bound by the weight for longer.
BUCKETS = (1, 16, 32, 64, 128)
ROWS_MAX = BUCKETS[-1]

_ROW = Setting(1, 4, 1024, 3, ahead=True)
_TILE = Setting(16, 64, 256, 4, swap=True, late=True)
_TILE_32 = replace(_TILE, rows=32)
_TILE_64 = replace(_TILE, rows=64)

# Of Llama-3.1-8B: (N, K) of a weight of eight-bit floats to the setting of each bucket; None for
# the library's product.
CHANNELS: dict[tuple[int, int], tuple[Setting | None, ...]] = {
    (6144, 4096): (
        replace(_ROW, block_n=2, block_k=2048, stages=2),
        replace(_TILE, stages=3, split=2, prefetch=64),
        replace(_TILE_32),
        replace(_TILE_64, late=False),
        None,
    ),
    (4096, 4096): (
        replace(_ROW, block_n=8, stages=1),
        replace(_TILE, split=4, prefetch=64),
        replace(_TILE_32, prefetch=16),
        replace(_TILE_64, prefetch=64),
        None,
    ),
    (28672, 4096): (
        replace(_ROW, stages=4),
        _TILE,
        replace(_TILE_32, prefetch=16),
        Setting(64, 64, 256, 3, prefetch=16, late=True),
        None,
    ),
    (4096, 14336): (
        replace(_ROW, block_n=8),
        replace(_TILE, block_k=512, stages=2, split=4, prefetch=64),
        replace(_TILE_32, split=4, late=False),
        Setting(64, 32, 256, 4, split=2, prefetch=16, late=True),
        None,
    ),
}

# Rows of products, by (N, K), that the library computes so much faster without scales that these
# are multiplied in by a kernel of their own.
SCALED_AFTER: dict[tuple[int, int], range] = {
    (4096, 4096): range(65, 385),
    (4096, 14336): range(65, 385),
}

# Programs a device with 132 multiprocessors should have at least.
_PROGRAMS_MIN = 190
# The same of codes that stand for values: picking those takes a warp so long that several have to
# take turns.
_PICKING_MIN = 450


def bucket_of(rows: int) -> int:
    """The index of the smallest bucket that holds so many rows, which are at most `ROWS_MAX`."""
    return next(i for i, bucket in enumerate(BUCKETS) if rows <= bucket)


def best_channels(outputs: int, inputs: int) -> tuple[Setting | None, ...]:
    """The setting of each bucket, for eight-bit floats with a scale an output."""
    found = CHANNELS.get((outputs, inputs))
    if found is not None:
        return found
    if inputs % 256 != 0:
        return (None,) * len(BUCKETS)
    split = 4 if -(-outputs // 64) < _PROGRAMS_MIN / 2 and inputs >= 4096 else 1
    few = replace(_TILE, split=split)
    return (_ROW, few, replace(few, rows=32), replace(few, rows=64), None)


def best_groups(outputs: int, inputs: int) -> tuple[Setting, ...]:
    """The setting of each bucket up to 64 rows, for integers of four bits in groups."""
    split = 1
    while -(-outputs // 64) * split < _PROGRAMS_MIN and inputs // split > 1024 and split < 8:
        split *= 2
    few = Setting(16, 64, 128, 6 if split > 1 else 4, split, late=True)
    return (
        few,
        few,
        replace(few, rows=32, stages=3, swap=split > 1),
        replace(few, rows=64, stages=3, split=min(split, 4), swap=True),
    )


def best_values(outputs: int, inputs: int) -> tuple[Setting, ...]:
    """The same for codes that stand for one of 16 values."""
    split = 1
    while -(-outputs // 64) * split < _PICKING_MIN and inputs // split > 512 and split < 8:
        split *= 2
    few = Setting(16, 64, 128, 3, split, swap=True, late=True)
    return (few, few, replace(few, rows=32), replace(few, rows=64, split=min(split, 4)))

"""The pool: how large it may be, what it starts as, and what zeroing touches."""

from pathlib import Path

import pytest
import torch

from headrace.device.cpu import CpuDevice
from headrace.kv import KvLayout, KvPool

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=8, block_tokens=4, dtype=torch.float32)
GIB = 1 << 30


def device(tmp_path: Path, available: int, cpu_flags: str = "fpu") -> CpuDevice:
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\n"
    )
    (tmp_path / "cpuinfo").write_text(
        f"processor : 0\nmodel name : A CPU\nflags : {cpu_flags}\n\nprocessor : 1\n"
    )
    return CpuDevice(threads=1, proc=tmp_path)


def test_bytes_are_counted():
    assert LAYOUT.bytes_per_token() == 2 * 3 * 2 * 8 * 4
    assert LAYOUT.bytes_per_block() == 4 * LAYOUT.bytes_per_token()
    pool = KvPool(LAYOUT, 5, torch.device("cpu"))
    assert pool.bytes() == 5 * LAYOUT.bytes_per_block()


def test_layers_are_views_of_one_zeroed_pool():
    pool = KvPool(LAYOUT, 5, torch.device("cpu"))
    keys, values = pool.layer(2)
    assert keys.shape == values.shape == (5, 4, 2, 8)
    assert keys.is_contiguous() and values.is_contiguous()
    assert not keys.any() and not values.any()
    keys.fill_(1)
    assert not pool.layer(1)[0].any() and not values.any()


def test_zeroing_touches_only_what_is_named():
    pool = KvPool(LAYOUT, 5, torch.device("cpu"))
    for layer in range(3):
        for cache in pool.layer(layer):
            cache.fill_(torch.nan)
    pool.zero(torch.tensor([1, 3]))
    for layer in range(3):
        for cache in pool.layer(layer):
            assert cache.flatten(1).isnan().all(1).tolist() == [True, False, True, False, True]
            assert not cache[[1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_pool_of_codes_has_half_the_bytes_and_is_zeroed(dtype: torch.dtype):
    wide = KvLayout(3, 2, 8, 4, torch.bfloat16)
    layout = KvLayout(3, 2, 8, 4, dtype)
    assert 2 * layout.bytes_per_token() == wide.bytes_per_token()
    pool = KvPool(layout, 5, torch.device("cpu"))
    for cache in pool.layer(1):
        assert cache.dtype == dtype and not cache.float().any()
        cache.fill_(torch.nan)
    pool.zero(torch.tensor([2]))
    for cache in pool.layer(1):
        assert cache.float().flatten(1).isnan().all(1).tolist() == [True, True, False, True, True]


def test_the_cpu_takes_a_quarter_and_four_gib_at_most(tmp_path: Path):
    # The machine's own cgroup may allow less than what the file says.
    small = device(tmp_path, GIB)
    assert small.kv_budget(0, 0, 1) == small.free_bytes() // 4
    assert small.kv_budget(0, 0, 2) == small.free_bytes() // 4 // 2
    large = device(tmp_path, 40 * GIB)
    assert large.kv_budget(0, 0, 1) <= 4 * GIB
    assert large.kv_budget(0, 0, 4) <= GIB


def test_the_cpu_does_what_it_is_told(tmp_path: Path):
    small = device(tmp_path, GIB)
    free = small.free_bytes()
    assert small.kv_budget(0.5, 0, 1) == free // 2
    assert small.kv_budget(0, 1 << 20, 1) == 1 << 20
    assert small.kv_budget(0.5, 1 << 20, 1) == 1 << 20
    assert small.kv_budget(0, 100 * GIB, 1) <= free


def test_memory_limits_of_cgroups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from headrace.device import cpu

    (tmp_path / "memory.max").write_text(str(100 << 20))
    (tmp_path / "memory.current").write_text(str(60 << 20))
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {10 << 20}\n")
    names = ("memory.max", "memory.current", "inactive_file")
    assert cpu._cgroup_room(tmp_path, *names) == [50 << 20]
    (tmp_path / "memory.max").write_text("max\n")
    assert cpu._cgroup_room(tmp_path, *names) == []


@pytest.mark.parametrize(
    ("flags", "dtype", "why"),
    [
        ("fpu avx512_bf16 sse", torch.bfloat16, "the CPU has avx512_bf16"),
        ("amx_bf16 avx512_bf16", torch.bfloat16, "the CPU has amx_bf16 and avx512_bf16"),
        ("fpu avx512f avx2", torch.float32, "neither amx_bf16 nor avx512_bf16"),
    ],
)
def test_auto_dtype_follows_the_cpu(tmp_path: Path, flags: str, dtype: torch.dtype, why: str):
    choice = device(tmp_path, GIB, flags).default_dtype(torch.bfloat16)
    assert choice.dtype == dtype and why in choice.why

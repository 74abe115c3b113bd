"""QK-norm, rotation and the write to the cache in one launch of Triton."""

# T tokens · H local query heads · K local kv heads · E head dim · C = (H + 2K)·E
# N blocks · P tokens per block

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from headrace.ops.kv_write.base import UNIT, KvScales, code_max
from headrace.ops.rope.base import QkNorm, QkvLayout, RopeAndKvWrite
from headrace.ops.triton import Gpu


@triton.jit
def load_halves(x, at, inside, DIM: tl.constexpr):
    """Returns both halves of some heads, in the dtype of `x`."""
    low = tl.load(x + at, mask=inside, other=0.0)
    high = tl.load(x + at + DIM // 2, mask=inside, other=0.0)
    return low, high


@triton.jit
def store_halves(x, at, inside, low, high, DIM: tl.constexpr):
    tl.store(x + at, low.to(x.dtype.element_ty), mask=inside)
    tl.store(x + at + DIM // 2, high.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_rotated(x, at, inside, cos_sin_E, weight_E, eps, i, DIM: tl.constexpr, NORM: tl.constexpr):
    """Returns both halves of some heads, normalised and rotated in float32."""
    in_head = i < DIM // 2
    low, high = load_halves(x, at, inside, DIM=DIM)
    cos, sin = load_halves(cos_sin_E, i, in_head, DIM=DIM)
    low, high = low.to(tl.float32), high.to(tl.float32)
    if NORM:
        low_weight, high_weight = load_halves(weight_E, i, in_head, DIM=DIM)
        scale = tl.rsqrt(tl.sum(low * low + high * high, axis=1) / DIM + eps)[:, None]
        low = low * scale * low_weight.to(tl.float32)[None, :]
        high = high * scale * high_weight.to(tl.float32)[None, :]
    cos, sin = cos[None, :], sin[None, :]
    # Fused as decode attention fuses them, whose queries and keys have these bits.
    return tl.fma(low, cos, high * -sin), tl.fma(high, cos, low * sin)


@triton.jit
def saturated(x, inverse, CODE_MAX: tl.constexpr):
    """What a cache keeps of some float32: themselves, or what is made codes, NaN included."""
    if CODE_MAX > 0.0:
        x = x.to(tl.float32) * inverse
        x = tl.where(x > CODE_MAX, CODE_MAX, tl.where(x < -CODE_MAX, -CODE_MAX, x))
    return x


# A slice of what a step uploads may begin anywhere: its alignment must not make a new kernel.
@triton.jit(do_not_specialize_on_alignment=["cells_T"])
def rope_and_kv_write_kernel(
    qkv_TC,  # queries and keys are overwritten
    cos_sin_TE,
    k_cache_NPKE,
    v_cache_NPKE,
    cells_T,
    q_weight_E,  # unused unless NORM
    k_weight_E,  # unused unless NORM
    eps,
    k_inverse,  # of the caches' scales; unused unless CODE_MAX
    v_inverse,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # heads a program
    HALF: tl.constexpr,  # the power of two at or above DIM / 2
    NORM: tl.constexpr,
    CODE_MAX: tl.constexpr,  # of caches that keep codes, else 0
    PDL: tl.constexpr,
):
    """A program has heads of one token and of one kind: queries, keys or values."""
    Q_PARTS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    K_PARTS: tl.constexpr = (KV_HEADS + GROUP - 1) // GROUP
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, HALF)
    head = tl.arange(0, GROUP)
    q_E = qkv_TC + token * ((HEADS + 2 * KV_HEADS) * DIM)
    k_E = q_E + HEADS * DIM
    v_E = k_E + KV_HEADS * DIM
    cos_sin_E = cos_sin_TE + token * DIM
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if part < Q_PARTS:
        head += part * GROUP
        inside = (head < HEADS)[:, None] & (i < DIM // 2)[None, :]
        at = (head * DIM)[:, None] + i[None, :]
        low, high = load_rotated(q_E, at, inside, cos_sin_E, q_weight_E, eps, i, DIM=DIM, NORM=NORM)
        store_halves(q_E, at, inside, low, high, DIM=DIM)
    else:
        # A cell's offset passes 2^31 in a large pool: cells are int64.
        cell = tl.load(cells_T + token) * (KV_HEADS * DIM)
        if part < Q_PARTS + K_PARTS:
            head += (part - Q_PARTS) * GROUP
            inside = (head < KV_HEADS)[:, None] & (i < DIM // 2)[None, :]
            at = (head * DIM)[:, None] + i[None, :]
            low, high = load_rotated(
                k_E, at, inside, cos_sin_E, k_weight_E, eps, i, DIM=DIM, NORM=NORM
            )
            store_halves(k_E, at, inside, low, high, DIM=DIM)
            low = saturated(low, k_inverse, CODE_MAX=CODE_MAX)
            high = saturated(high, k_inverse, CODE_MAX=CODE_MAX)
            store_halves(k_cache_NPKE + cell, at, inside, low, high, DIM=DIM)
        else:
            head += (part - Q_PARTS - K_PARTS) * GROUP
            inside = (head < KV_HEADS)[:, None] & (i < DIM // 2)[None, :]
            at = (head * DIM)[:, None] + i[None, :]
            as_is_low, as_is_high = load_halves(v_E, at, inside, DIM=DIM)
            as_is_low = saturated(as_is_low, v_inverse, CODE_MAX=CODE_MAX)
            as_is_high = saturated(as_is_high, v_inverse, CODE_MAX=CODE_MAX)
            store_halves(v_cache_NPKE + cell, at, inside, as_is_low, as_is_high, DIM=DIM)


@dataclass(frozen=True)
class Settings:
    """How a launch is divided."""

    group: int  # heads a program, a power of two
    warps: int  # a program

    @staticmethod
    def best(layout: QkvLayout) -> Settings:
        """Two 16-byte accesses a thread and half head; no more heads than a kind has."""
        group = max(1, min(1024 // layout.head_dim, triton.next_power_of_2(layout.kv_heads)))
        return Settings(group, warps=1)


class TritonRope:
    """Signatures and meaning: `base.py`. Queries and keys are rotated in place."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def rope_and_kv_write(
        self,
        qkv_TC: Tensor,
        cos_sin_TE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        cells_T: Tensor,
        layout: QkvLayout,
        norm: QkNorm | None,
        scales: KvScales = UNIT,
        settings: Settings | None = None,
    ) -> Tensor:
        tokens, dim = qkv_TC.shape[0], layout.head_dim
        assert qkv_TC.is_contiguous() and cos_sin_TE.is_contiguous() and cells_T.is_contiguous()
        assert k_cache_NPKE.is_contiguous() and v_cache_NPKE.is_contiguous()
        assert qkv_TC.shape[1] == layout.columns and cos_sin_TE.shape[1] == dim and dim % 2 == 0
        settings = settings or Settings.best(layout)
        q_parts = triton.cdiv(layout.heads, settings.group)
        kv_parts = triton.cdiv(layout.kv_heads, settings.group)
        self._gpu.run(
            rope_and_kv_write_kernel,
            (tokens, q_parts + 2 * kv_parts),
            qkv_TC,
            cos_sin_TE,
            k_cache_NPKE,
            v_cache_NPKE,
            cells_T,
            qkv_TC if norm is None else norm.q_E,
            qkv_TC if norm is None else norm.k_E,
            0.0 if norm is None else norm.eps,
            1.0 / scales.k,
            1.0 / scales.v,
            HEADS=layout.heads,
            KV_HEADS=layout.kv_heads,
            DIM=dim,
            GROUP=settings.group,
            HALF=triton.next_power_of_2(dim // 2),
            NORM=norm is not None,
            CODE_MAX=code_max(k_cache_NPKE.dtype),
            warps=settings.warps,
        )
        return qkv_TC[:, : layout.heads * dim].view(tokens, layout.heads, dim)


def triton_rope_and_kv_write(gpu: Gpu) -> RopeAndKvWrite:
    """Returns what `reference.rope_and_kv_write` is."""
    return TritonRope(gpu).rope_and_kv_write

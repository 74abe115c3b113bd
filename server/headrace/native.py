"""The library of CPU kernels: finding it, and its functions with types.

The library is C++ behind a plain C interface (`server/kernels/kernels.h`), built with the wheel
where there is a C++ compiler. It chooses by CPU flags at run time what it executes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from enum import IntEnum
from pathlib import Path

import torch

VERSION = 3  # of the interface; kernels.h counts its changes
LIBRARY = Path(__file__).parent / "_native" / "libheadrace_kernels.so"


class Isa(IntEnum):
    """The instruction sets that the kernels are compiled for, the best last."""

    BASELINE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512BF16 = 3


class AttentionCall(Structure):
    """`KernelsAttention` of kernels.h."""

    _fields_ = [
        ("q", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("o", c_void_p),
        ("row_start", c_void_p),
        ("row_len", c_void_p),
        ("table", c_void_p),
        ("q_stride", c_int64),
        ("table_stride", c_int64),
        ("rows", c_int32),
        ("type", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_tokens", c_int32),
        ("window", c_int32),
        ("scale", c_float),
    ]


class LinearCall(Structure):
    """`KernelsLinear` of kernels.h."""

    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("type", c_int32),
        ("group", c_int32),
    ]


class LayerCall(Structure):
    """`KernelsLayer` of kernels.h."""

    _fields_ = [
        ("qkv", LinearCall),
        ("out", LinearCall),
        ("gate_up", LinearCall),
        ("down", LinearCall),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("window", c_int64),
    ]


class DecoderCall(Structure):
    """`KernelsDecoder` of kernels.h."""

    _fields_ = [
        ("layers", POINTER(LayerCall)),
        ("embedding", c_void_p),
        ("norm", c_void_p),
        ("head", LinearCall),
        ("layer_count", c_int64),
        ("type", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_tokens", c_int32),
        ("eps", c_float),
    ]


class StepCall(Structure):
    """`KernelsStep` of kernels.h."""

    _fields_ = [
        ("ids", c_void_p),
        ("cos_sin", c_void_p),
        ("cells", c_void_p),
        ("sampled", c_void_p),
        ("row_start", c_void_p),
        ("row_len", c_void_p),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("tokens", c_int64),
        ("sampled_count", c_int64),
        ("rows", c_int64),
        ("logits", c_void_p),
    ]


# Of weights, 2 are codes of four bits and 3 of eight.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}
CODES_4, CODES_8 = 2, 3


def type_of(dtype: torch.dtype) -> int:
    """The library's number of a dtype."""
    return _TYPES[dtype]


class Kernels:
    """The functions of the library. Pointers are `Tensor.data_ptr()`; None is a null pointer.

    The library has one team of threads and one instruction set in use: all objects share them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        def function(name: str, result: type | None, *arguments: type) -> Callable[..., int]:
            found = getattr(library, f"kernels_{name}")
            found.restype, found.argtypes = result, arguments
            return found

        p, i32, i64 = c_void_p, c_int32, c_int64
        self._best_isa = function("best_isa", i32)
        self._set_isa = function("set_isa", i32, i32)
        self._set_threads = function("set_threads", i32, i32)
        self.allocate = function("allocate", p, c_size_t)
        self.release = function("release", None, p)
        self.packed_bytes = function("packed_bytes", i64, i64, i64, i32)
        self.pack = function("pack", None, p, i32, i64, p, i64, i64, i32, p)
        self.coded_bytes = function("coded_bytes", i64, i64, i64, i64, i32)
        self.pack_codes = function("pack_codes", None, p, p, p, p, i64, i64, i64, i32, p)
        self.matmul = function("matmul", None, p, i32, i64, i64, p, i32, i64, i64, i64, p, p)
        self.rms_norm = function("rms_norm", None, p, p, p, c_float, i32, i64, i64, p)
        self.silu_mul = function("silu_mul", None, p, i32, i64, i64, p)
        self.rope_and_kv_write = function(
            "rope_and_kv_write",
            *(None, p, p, p, p, p, i32, i64, i32, i32, i32, i32, p, p, c_float),
        )
        self.attention = function("attention", None, POINTER(AttentionCall))
        self.decoder = function("decoder", None, POINTER(DecoderCall), POINTER(StepCall))

    @property
    def best_isa(self) -> Isa:
        """The best instruction set of this CPU that the library has kernels for."""
        return Isa(self._best_isa())

    def set_isa(self, isa: Isa | None) -> Isa:
        """Takes another instruction set (None: the best). Returns the one in use: what is asked
        for, or the best where the CPU does not have that."""
        return Isa(self._set_isa(-1 if isa is None else int(isa)))

    def set_threads(self, threads: int) -> int:
        """Sets how many threads an operation may use, the caller's included."""
        return self._set_threads(threads)


def load(path: Path = LIBRARY) -> Kernels | str:
    """Loads the library.

    Returns: its functions, or the reason why there are none.
    """
    if not path.exists():
        return "the kernel library is not built (no C++ compiler?)"
    try:
        library = ctypes.CDLL(str(path))
        library.kernels_isa_name.restype = c_char_p
        if library.kernels_version() != VERSION:
            return "the kernel library is of another version"
        return Kernels(library)
    except (OSError, AttributeError) as error:
        return f"the kernel library cannot be loaded: {error}"

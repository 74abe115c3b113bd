"""The functions of cuBLASLt that are called, and the constants of cublasLt.h that they take.

The library is the one PyTorch has loaded. Descriptors are created by the library, because their
sizes differ between its versions; those of `AlgoBytes` and `HeuristicResult` do not.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from typing import Any

import torch

# The version whose header was read.
MAJOR = 13
SONAME = f"libcublasLt.so.{MAJOR}"

SUCCESS = 0
# CUBLAS_STATUS_INVALID_VALUE, _ARCH_MISMATCH, _NOT_SUPPORTED: an algorithm that does not fit.
REFUSALS = (7, 8, 15)
DTYPES = {torch.float16: 2, torch.bfloat16: 14}  # CUDA_R_16F, CUDA_R_16BF
R_32F = 0  # CUDA_R_32F
COMPUTE_32F = 68  # CUBLAS_COMPUTE_32F
OP_T = 1  # CUBLAS_OP_T
ORDER_ROW = 1  # CUBLASLT_ORDER_ROW
LAYOUT_ORDER = 1  # CUBLASLT_MATRIX_LAYOUT_ORDER
# CUBLASLT_MATMUL_DESC_*
DESC_TRANSA, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 7, 8
EPILOGUE_BIAS = 4  # CUBLASLT_EPILOGUE_BIAS
# CUBLASLT_MATMUL_PREF_*; alignments are those of A, B, C, D.
PREF_MAX_WORKSPACE_BYTES, PREF_REDUCTION_SCHEME_MASK = 1, 3
PREF_MIN_ALIGNMENTS = (5, 6, 7, 8)
# CUBLASLT_REDUCTION_SCHEME_*: how partial sums are added up.
REDUCE_INPLACE, REDUCE_COMPUTE_TYPE, REDUCE_OUTPUT_TYPE, REDUCE_ANY = 1, 2, 4, 7


class AlgoBytes(ctypes.Structure):
    """cublasLtMatmulAlgo_t."""

    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", AlgoBytes),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


ALGO_BYTES = ctypes.sizeof(AlgoBytes)

# Arguments of each function that returns a status. Every handle and descriptor is a pointer.
_P = c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (_P,),
    # type, rows, columns, stride of columns
    "cublasLtMatrixLayoutCreate": (_P, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (_P,),
    "cublasLtMatrixLayoutSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatrixLayoutGetAttribute": (_P, c_int, _P, c_size_t, _P),
    # compute type, scale type
    "cublasLtMatmulDescCreate": (_P, c_int, c_int),
    "cublasLtMatmulDescDestroy": (_P,),
    "cublasLtMatmulDescSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatmulDescGetAttribute": (_P, c_int, _P, c_size_t, _P),
    "cublasLtMatmulPreferenceCreate": (_P,),
    "cublasLtMatmulPreferenceDestroy": (_P,),
    "cublasLtMatmulPreferenceSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatmulPreferenceGetAttribute": (_P, c_int, _P, c_size_t, _P),
    # handle, operation, A, B, C, D, preference, count asked, results, count returned
    "cublasLtMatmulAlgoGetHeuristic": (_P, _P, _P, _P, _P, _P, _P, c_int, _P, _P),
    # handle, operation, A, B, C, D, algorithm, result
    "cublasLtMatmulAlgoCheck": (_P, _P, _P, _P, _P, _P, _P, _P),
    "cublasLtMatmulAlgoConfigSetAttribute": (_P, c_int, _P, c_size_t),
    "cublasLtMatmulAlgoConfigGetAttribute": (_P, c_int, _P, c_size_t, _P),
    "cublasLtMatmulAlgoCapGetAttribute": (_P, c_int, _P, c_size_t, _P),
    # handle, operation, alpha, A and layout, B and layout, beta, C and layout, D and layout,
    # algorithm, workspace, its bytes, stream
    "cublasLtMatmul": (_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, c_size_t, _P),
}


class LtError(RuntimeError):
    """A function of the library failed."""

    def __init__(self, function: str, name: str) -> None:
        super().__init__(f"{function}: {name}")
        self.status = name


class Library:
    """cuBLASLt as PyTorch has loaded it; raises `OSError` if it has not."""

    def __init__(self) -> None:
        # Never a second copy of half a gigabyte: only what is in the process already.
        self._c = ctypes.CDLL(SONAME, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        self._c.cublasLtGetVersion.restype = c_size_t
        self._c.cublasLtGetStatusName.restype = ctypes.c_char_p
        self._c.cublasLtGetStatusName.argtypes = (c_int,)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.argtypes = arguments
            function.restype = c_int
        self.version: int = self._c.cublasLtGetVersion()
        self.matmul: Any = self._c.cublasLtMatmul

    def status_name(self, status: int) -> str:
        return self._c.cublasLtGetStatusName(status).decode()

    def status(self, function: str, *arguments: Any) -> int:
        """Calls a function; returns its status."""
        return getattr(self._c, function)(*arguments)

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function; raises `LtError`."""
        status = self.status(function, *arguments)
        if status != SUCCESS:
            raise LtError(function, self.status_name(status))

    def created(self, kind: str, *arguments: Any) -> int:
        """The address of a new cublasLt<kind>_t."""
        made = c_void_p()
        self.call(f"cublasLt{kind}Create", byref(made), *arguments)
        assert made.value is not None, "the library returned no descriptor"
        return made.value

    def set(self, kind: str, descriptor: int, attribute: int, value: Any) -> None:
        """Sets an attribute to a ctypes value of its size."""
        size = ctypes.sizeof(value)
        self.call(f"cublasLt{kind}SetAttribute", descriptor, attribute, byref(value), size)


def library() -> Library | str:
    """The library, or why there is none."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if torch.version.cuda.split(".", maxsplit=1)[0] != str(MAJOR):
        return f"this PyTorch was built for CUDA {torch.version.cuda}, not {MAJOR}"
    try:
        return Library()
    except (OSError, AttributeError) as error:
        return f"{SONAME} is not what PyTorch has loaded: {error}"

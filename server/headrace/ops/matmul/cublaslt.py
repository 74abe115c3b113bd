"""Matrix products through cuBLASLt, by algorithms that were chosen by measurement.

cuBLASLt has many algorithms for a product and estimates which is fastest; its guess is often some
percent off. `bench/gpu/cublaslt.py` measures them and writes `cublaslt.json`: by GPU, version
of the library, dtype and shape the bytes of the fastest, which the same version accepts again.

Matrices of the library are column by column. Row by row, y = x @ w.T is in its terms y' = w x' with
w' [K, N] transposed, x' [K, M] and y' [N, M]; or, `flip`, x w' with the result row by row.
"""

# M rows · N outputs · K inputs

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from ctypes import byref, c_float, c_int, c_int32, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.matmul.cublaslt_abi import (
    ALGO_BYTES,
    COMPUTE_32F,
    DESC_BIAS_POINTER,
    DESC_EPILOGUE,
    DESC_TRANSA,
    DTYPES,
    EPILOGUE_BIAS,
    LAYOUT_ORDER,
    OP_T,
    ORDER_ROW,
    PREF_MAX_WORKSPACE_BYTES,
    PREF_MIN_ALIGNMENTS,
    PREF_REDUCTION_SCHEME_MASK,
    R_32F,
    REDUCE_ANY,
    REFUSALS,
    SUCCESS,
    AlgoBytes,
    HeuristicResult,
    Library,
    LtError,
    library,
)

TABLE = Path(__file__).with_name("cublaslt.json")

# Scratch of algorithms that split sums. As much as PyTorch gives cuBLAS on these devices.
WORKSPACE_BYTES = 32 << 20
# Of addresses and of rows; what 128-bit loads and bulk copies need.
ALIGN_BYTES = 16
# Remembered descriptors: each a few hundred bytes, made anew in microseconds.
PLANS_MAX = 2048


@dataclass(frozen=True)
class Algo:
    """An algorithm, as its version of the library reads it."""

    data: bytes  # of an `AlgoBytes`
    flip: bool = False  # whether x is the library's A, and the result row by row


@dataclass(frozen=True)
class Measured:
    """The fastest algorithm of products of one shape."""

    rows_min: int
    rows_max: int
    outputs: int
    inputs: int
    residual: bool
    algo: Algo


def read_table(text: str, gpu: str, version: int, dtype: torch.dtype) -> list[Measured]:
    """What a table says of a GPU, a version of the library and a dtype; raises `ValueError`."""
    wanted = (gpu, version, str(dtype).removeprefix("torch."))
    found = []
    try:
        for table in json.loads(text)["tables"]:
            if (table["gpu"], table["cublaslt"], table["dtype"]) == wanted:
                found += [_measured(product) for product in table["products"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a table of algorithms lacks {error}") from error
    return found


def _measured(product: dict[str, Any]) -> Measured:
    data = bytes.fromhex(product["algo"])
    rows_min, rows_max = product["rows"]
    if len(data) != ALGO_BYTES or not 1 <= rows_min <= rows_max:
        raise ValueError(f"not a measured product: {product}")
    return Measured(
        rows_min,
        rows_max,
        product["outputs"],
        product["inputs"],
        product["residual"],
        Algo(data, product["flip"]),
    )


@dataclass(frozen=True)
class Problem:
    """What an algorithm is chosen for."""

    M: int
    N: int
    K: int
    x_stride: int
    dtype: torch.dtype
    bias: bool
    residual: bool

    @property
    def refusal(self) -> str | None:
        """Why cuBLASLt is not asked, or None."""
        if self.dtype not in DTYPES:
            return f"has no {self.dtype} path"
        every = ALIGN_BYTES // 2  # elements of 2 bytes
        if self.K % every or self.N % every or self.x_stride % every:
            return f"rows are not multiples of {ALIGN_BYTES} bytes"
        if self.M < 1 or self.N < 1 or self.K < 1 or self.x_stride < self.K:
            return "there is nothing to multiply, or rows overlap"
        return None


class Descriptors:
    """A problem as the library is told of it."""

    def __init__(self, library: Library, problem: Problem, flip: bool) -> None:
        self._library = library
        M, N, K = problem.M, problem.N, problem.K
        kind = DTYPES[problem.dtype]
        self.operation = library.created("MatmulDesc", COMPUTE_32F, R_32F)
        library.set("MatmulDesc", self.operation, DESC_TRANSA, c_int32(OP_T))
        if problem.bias:
            library.set("MatmulDesc", self.operation, DESC_EPILOGUE, c_uint32(EPILOGUE_BIAS))
        w = library.created("MatrixLayout", kind, K, N, K)
        x = library.created("MatrixLayout", kind, K, M, problem.x_stride)
        self.a, self.b = (x, w) if flip else (w, x)
        rows, columns = (M, N) if flip else (N, M)
        self.y = library.created("MatrixLayout", kind, rows, columns, N if flip else rows)
        if flip:
            library.set("MatrixLayout", self.y, LAYOUT_ORDER, c_int32(ORDER_ROW))

    def set_bias(self, address: int) -> None:
        self._library.set("MatmulDesc", self.operation, DESC_BIAS_POINTER, c_void_p(address))

    def close(self) -> None:
        for layout in (self.a, self.b, self.y):
            self._library.call("cublasLtMatrixLayoutDestroy", layout)
        self._library.call("cublasLtMatmulDescDestroy", self.operation)


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a problem is launched."""

    descriptors: Descriptors
    algo: AlgoBytes
    algo_address: int
    flip: bool


class CublasLt:
    """The products of one device.

    They share scratch at one address, so one is computed at a time: products of a device run on one
    stream. Recorded launches stay valid as long as the object lives.
    """

    def __init__(self, device: torch.device, table: Path = TABLE) -> None:
        """Raises `RuntimeError` where `available` has a reason.

        Args:
            table: the measured algorithms.
        """
        found = library()
        if isinstance(found, str):
            raise RuntimeError(found)
        self.library = found
        self.device = device
        with torch.cuda.device(device):
            self._handle = found.created("")
        # Allocated here, never while a graph is recorded.
        self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._workspace_address = self._workspace.data_ptr()
        self._one, self._zero = c_float(1.0), c_float(0.0)
        self._one_address = ctypes.addressof(self._one)
        self._zero_address = ctypes.addressof(self._zero)
        self._plans: dict[tuple[Any, ...], _Plan | None] = {}
        self._table: dict[tuple[torch.dtype, int, int, bool], list[Measured]] = {}
        name, text = torch.cuda.get_device_name(device), table.read_text()
        for dtype in DTYPES:
            for row in read_table(text, name, found.version, dtype):
                key = (dtype, row.outputs, row.inputs, row.residual)
                self._table.setdefault(key, []).append(row)

    @staticmethod
    def available(device: torch.device) -> str | None:
        """Why products on the device cannot go through cuBLASLt, or None."""
        if device.type != "cuda":
            return "runs on CUDA devices"
        if not torch.cuda.is_available():
            return "no CUDA device is visible"
        found = library()
        return found if isinstance(found, str) else None

    def tuned(self, M: int, N: int, K: int, dtype: torch.dtype, residual: bool = False) -> bool:
        """Whether a measured algorithm beats PyTorch's product of this shape."""
        return self._from_table(M, N, K, dtype, residual) is not None

    def product(
        self,
        x_MK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        out_MN: Tensor | None = None,
        residual_MN: Tensor | None = None,
    ) -> Tensor:
        """Returns x_MK @ weight_NK.T + bias_N + residual_MN in the dtype of `x_MK`.

        By the measured algorithm, else the library's first choice, else PyTorch. Sums are in
        float32 and rounded once, unless PyTorch computes them.

        Args:
            weight_NK: of the dtype of `x_MK`, as are all.
            out_MN: where the result goes, contiguous; may be `residual_MN`. Default: a new tensor.
        """
        done = self._run(None, x_MK, weight_NK, bias_N, out_MN, residual_MN)
        if done is not None:
            return done
        y_MN = F.linear(x_MK, weight_NK, bias_N)
        if residual_MN is not None:
            y_MN += residual_MN
        return y_MN if out_MN is None else out_MN.copy_(y_MN)

    def product_with(
        self,
        algo: Algo,
        x_MK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None = None,
        out_MN: Tensor | None = None,
        residual_MN: Tensor | None = None,
    ) -> Tensor:
        """As `product`, by one algorithm; raises `ValueError` where that is refused."""
        done = self._run(algo, x_MK, weight_NK, bias_N, out_MN, residual_MN)
        if done is None:
            raise ValueError("the algorithm is refused for these operands")
        return done

    def choices(
        self,
        problem: Problem,
        count: int,
        workspace_bytes: int = WORKSPACE_BYTES,
        reductions: int = REDUCE_ANY,
        flip: bool = False,
    ) -> list[Algo]:
        """At most `count` algorithms, those that the library estimates to be fastest first.

        Args:
            reductions: the schemes allowed, `REDUCE_*`; 0 for no split sums.
        """
        if problem.refusal is not None or (problem.bias and flip):
            return []
        descriptors = Descriptors(self.library, problem, flip)
        try:
            found = self._heuristic(descriptors, count, workspace_bytes, reductions)
        finally:
            descriptors.close()
        return [Algo(data, flip) for data in found]

    def accepts(self, problem: Problem, algo: Algo) -> bool:
        """Whether the library says that it can compute the problem so."""
        if problem.refusal is not None or (problem.bias and algo.flip):
            return False
        descriptors = Descriptors(self.library, problem, algo.flip)
        try:
            return self._checked(descriptors, algo.data)
        finally:
            descriptors.close()

    # === one launch ===

    def _run(
        self,
        algo: Algo | None,
        x_MK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        out_MN: Tensor | None,
        residual_MN: Tensor | None,
    ) -> Tensor | None:
        """Launches a product; None where cuBLASLt is not asked."""
        (M, K), (N, K_w) = x_MK.shape, weight_NK.shape
        dtype, x_stride = x_MK.dtype, x_MK.stride(0) if M > 1 else K
        key = (M, N, K, x_stride, dtype, bias_N is not None, residual_MN is not None, algo)
        if key not in self._plans:
            self._remember(key, self._planned(Problem(*key[:-1]), algo, bias_N))
        plan = self._plans[key]
        same = dtype == weight_NK.dtype and K_w == K and x_MK.stride(1) == 1
        if plan is None or not same or not weight_NK.is_contiguous():
            return None
        y_MN = out_MN
        if y_MN is None:
            y_MN = torch.empty((M, N), dtype=dtype, device=x_MK.device)
        c_MN = y_MN if residual_MN is None else residual_MN
        x, w, y, c = x_MK.data_ptr(), weight_NK.data_ptr(), y_MN.data_ptr(), c_MN.data_ptr()
        bias = 0 if bias_N is None else bias_N.data_ptr()
        fits = _fits(y_MN, M, N, dtype) and (c_MN is y_MN or _fits(c_MN, M, N, dtype))
        if not fits or (x | w | y | c | bias) % ALIGN_BYTES:
            return None
        if bias_N is not None:
            if bias_N.dtype != dtype:
                return None
            plan.descriptors.set_bias(bias)
        descriptors = plan.descriptors
        beta = self._zero_address if residual_MN is None else self._one_address
        a, b = (x, w) if plan.flip else (w, x)
        status = self.library.matmul(
            self._handle,
            descriptors.operation,
            self._one_address,
            a,
            descriptors.a,
            b,
            descriptors.b,
            beta,
            c,
            descriptors.y,
            y,
            descriptors.y,
            plan.algo_address,
            self._workspace_address,
            WORKSPACE_BYTES,
            torch.cuda.current_stream(self.device).cuda_stream,
        )
        if status in REFUSALS:  # nothing was launched
            descriptors.close()
            self._plans[key] = None
            return None
        if status != SUCCESS:
            raise LtError(f"cublasLtMatmul of {key[:-1]}", self.library.status_name(status))
        return y_MN

    def _remember(self, key: tuple[Any, ...], plan: _Plan | None) -> None:
        if len(self._plans) >= PLANS_MAX:
            oldest = self._plans.pop(next(iter(self._plans)))
            if oldest is not None:
                oldest.descriptors.close()
        self._plans[key] = plan

    # === choosing ===

    def _planned(self, problem: Problem, algo: Algo | None, bias_N: Tensor | None) -> _Plan | None:
        """The algorithm given, or the first that the library accepts."""
        if problem.refusal is not None:
            return None
        wanted = self._wanted(problem) if algo is None else [(algo.flip, algo.data)]
        for flip, asked in wanted:
            if problem.bias and flip:
                continue  # a bias is the library's only along the rows of its result
            descriptors = Descriptors(self.library, problem, flip)
            if bias_N is not None:
                descriptors.set_bias(bias_N.data_ptr())
            if asked is None:
                found = self._heuristic(descriptors, 1, WORKSPACE_BYTES, REDUCE_ANY)
            else:
                found = [asked] if self._checked(descriptors, asked) else []
            if found:
                held = AlgoBytes.from_buffer_copy(found[0])
                return _Plan(descriptors, held, ctypes.addressof(held), flip)
            descriptors.close()
        return None

    def _wanted(self, problem: Problem) -> Iterator[tuple[bool, bytes | None]]:
        """What to try, in order; None for the library's own choice."""
        algo = self._from_table(problem.M, problem.N, problem.K, problem.dtype, problem.residual)
        if algo is not None:
            yield algo.flip, algo.data
        yield False, None

    def _from_table(
        self, M: int, N: int, K: int, dtype: torch.dtype, residual: bool
    ) -> Algo | None:
        for row in self._table.get((dtype, N, K, residual), ()):
            if row.rows_min <= M <= row.rows_max:
                return row.algo
        return None

    def _heuristic(
        self, descriptors: Descriptors, count: int, workspace_bytes: int, reductions: int
    ) -> list[bytes]:
        preference = self.library.created("MatmulPreference")
        try:
            settings: list[tuple[int, Any]] = [
                (PREF_MAX_WORKSPACE_BYTES, c_uint64(workspace_bytes)),
                (PREF_REDUCTION_SCHEME_MASK, c_uint32(reductions)),
                *((attribute, c_uint32(ALIGN_BYTES)) for attribute in PREF_MIN_ALIGNMENTS),
            ]
            for attribute, value in settings:
                self.library.set("MatmulPreference", preference, attribute, value)
            results, returned = (HeuristicResult * count)(), c_int(0)
            d = descriptors
            status = self.library.status(
                "cublasLtMatmulAlgoGetHeuristic",
                *(self._handle, d.operation, d.a, d.b, d.y, d.y),
                *(preference, count, results, byref(returned)),
            )
        finally:
            self.library.call("cublasLtMatmulPreferenceDestroy", preference)
        if status != SUCCESS:  # the library knows no algorithm
            return []
        return [
            bytes(result.algo)
            for result in results[: returned.value]
            if result.state == SUCCESS and result.workspace_bytes <= workspace_bytes
        ]

    def _checked(self, descriptors: Descriptors, data: bytes) -> bool:
        algo, result = AlgoBytes.from_buffer_copy(data), HeuristicResult()
        d = descriptors
        status = self.library.status(
            "cublasLtMatmulAlgoCheck",
            *(self._handle, d.operation, d.a, d.b, d.y, d.y),
            *(byref(algo), byref(result)),
        )
        return status == SUCCESS and result.workspace_bytes <= WORKSPACE_BYTES


def _fits(y_MN: Tensor, M: int, N: int, dtype: torch.dtype) -> bool:
    return y_MN.shape == (M, N) and y_MN.dtype == dtype and y_MN.is_contiguous()

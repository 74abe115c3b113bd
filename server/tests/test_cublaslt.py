"""Products through cuBLASLt: what the library is told, the table, and on a device the products."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.ops.matmul import cublaslt
from headrace.ops.matmul.cublaslt import (
    TABLE,
    Algo,
    CublasLt,
    Descriptors,
    Problem,
    read_table,
)
from headrace.ops.matmul.cublaslt_abi import (
    ALGO_BYTES,
    DESC_BIAS_POINTER,
    DESC_EPILOGUE,
    DESC_TRANSA,
    DTYPES,
    EPILOGUE_BIAS,
    LAYOUT_ORDER,
    ORDER_ROW,
    PREF_MAX_WORKSPACE_BYTES,
    PREF_MIN_ALIGNMENTS,
    PREF_REDUCTION_SCHEME_MASK,
    SUCCESS,
    HeuristicResult,
    Library,
    library,
)

DEVICE = torch.device("cuda")
FOUND = library()
needs_library = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
# Relative to the largest value: the rounding of the result.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
# CUBLASLT_MATRIX_LAYOUT_ROWS, _COLS, _LD
LAYOUT_ROWS, LAYOUT_COLUMNS, LAYOUT_STRIDE = 2, 3, 4
ALGO = Algo(bytes(range(ALGO_BYTES)))
SECTION = {"gpu": "NVIDIA H200", "cublaslt": 130100, "dtype": "bfloat16"}
PRODUCT: dict[str, Any] = {
    "rows": [33, 64],
    "outputs": 4096,
    "inputs": 14336,
    "residual": False,
    "flip": False,
    "algo": ALGO.data.hex(),
    "us": 30.0,
    "torch_us": 33.0,
}


def problem(M: int = 64, N: int = 256, K: int = 128, **changes: Any) -> Problem:
    facts = {"x_stride": K, "dtype": torch.bfloat16, "bias": False, "residual": False} | changes
    return Problem(M, N, K, **facts)


def table(*products: dict[str, Any], **section: Any) -> str:
    return json.dumps({"tables": [SECTION | section | {"products": list(products)}]})


def attribute(lib: Library, kind: str, descriptor: int, number: int, value: Any) -> int:
    """Reads an attribute; fails unless it has the size of the value."""
    written = ctypes.c_size_t()
    size = ctypes.sizeof(value)
    where = (ctypes.byref(value), size, ctypes.byref(written))
    lib.call(f"cublasLt{kind}GetAttribute", descriptor, number, *where)
    assert written.value == size
    return value.value


# === what the library is told ===


def test_structures_have_the_sizes_of_the_header() -> None:
    assert ALGO_BYTES == 64
    assert ctypes.sizeof(HeuristicResult) == 96
    names = ("algo", "workspace_bytes", "state", "waves", "reserved")
    offsets = [getattr(HeuristicResult, name).offset for name in names]
    assert offsets == [0, 64, 72, 76, 80]


@needs_library
def test_the_library_is_of_the_version_whose_header_was_read() -> None:
    assert isinstance(FOUND, Library)
    assert FOUND.version // 10000 == 13
    assert FOUND.status_name(SUCCESS) == "CUBLAS_STATUS_SUCCESS"
    assert FOUND.status_name(15) == "CUBLAS_STATUS_NOT_SUPPORTED"


@needs_library
@pytest.mark.parametrize("flip", [False, True])
def test_descriptors_say_what_they_should(flip: bool) -> None:
    assert isinstance(FOUND, Library)
    made = Descriptors(FOUND, problem(M=40, N=256, K=128, x_stride=192), flip)
    wanted = {
        made.b if flip else made.a: (128, 256, 128),  # the weight
        made.a if flip else made.b: (128, 40, 192),
        made.y: (40, 256, 256) if flip else (256, 40, 256),
    }
    for layout, (rows, columns, stride) in wanted.items():
        for number, value in ((LAYOUT_ROWS, rows), (LAYOUT_COLUMNS, columns)):
            held = attribute(FOUND, "MatrixLayout", layout, number, ctypes.c_uint64())
            assert held == value
        held = attribute(FOUND, "MatrixLayout", layout, LAYOUT_STRIDE, ctypes.c_int64())
        assert held == stride
        assert attribute(FOUND, "MatrixLayout", layout, 0, ctypes.c_uint32()) == 14
    order = attribute(FOUND, "MatrixLayout", made.y, LAYOUT_ORDER, ctypes.c_int32())
    assert order == (ORDER_ROW if flip else 0)
    # compute type, scale type, pointer mode (host), transpositions of A and B, epilogue (none)
    expected = {0: 68, 1: 0, 2: 0, DESC_TRANSA: 1, 4: 0}
    for number, value in expected.items():
        held = attribute(FOUND, "MatmulDesc", made.operation, number, ctypes.c_int32())
        assert held == value, number
    assert attribute(FOUND, "MatmulDesc", made.operation, DESC_EPILOGUE, ctypes.c_uint32()) == 1
    made.close()


@needs_library
def test_a_bias_is_told() -> None:
    assert isinstance(FOUND, Library)
    made = Descriptors(FOUND, problem(bias=True), flip=False)
    made.set_bias(4096)
    held = attribute(FOUND, "MatmulDesc", made.operation, DESC_EPILOGUE, ctypes.c_uint32())
    assert held == EPILOGUE_BIAS
    held = attribute(FOUND, "MatmulDesc", made.operation, DESC_BIAS_POINTER, ctypes.c_void_p())
    assert held == 4096
    made.close()


@needs_library
def test_preferences_have_their_sizes() -> None:
    assert isinstance(FOUND, Library)
    preference = FOUND.created("MatmulPreference")
    sizes: list[tuple[int, Any]] = [
        (PREF_MAX_WORKSPACE_BYTES, ctypes.c_uint64),
        (PREF_REDUCTION_SCHEME_MASK, ctypes.c_uint32),
        *((number, ctypes.c_uint32) for number in PREF_MIN_ALIGNMENTS),
    ]
    for number, kind in sizes:
        default = attribute(FOUND, "MatmulPreference", preference, number, kind())
        named = {PREF_MAX_WORKSPACE_BYTES: 0, PREF_REDUCTION_SCHEME_MASK: 7}
        assert default == named.get(number, 256)
        FOUND.set("MatmulPreference", preference, number, kind(16))
        assert attribute(FOUND, "MatmulPreference", preference, number, kind()) == 16
    FOUND.call("cublasLtMatmulPreferenceDestroy", preference)


@needs_library
def test_failures_have_names() -> None:
    assert isinstance(FOUND, Library)
    with pytest.raises(RuntimeError, match="cublasLtMatmulDescCreate: CUBLAS_STATUS_INVALID_VALUE"):
        FOUND.call("cublasLtMatmulDescCreate", None, 68, 0)


# === the table ===


def test_a_table_is_for_one_gpu_version_and_dtype() -> None:
    text = table(PRODUCT)
    rows = read_table(text, "NVIDIA H200", 130100, torch.bfloat16)
    assert [(r.rows_min, r.rows_max, r.outputs, r.inputs) for r in rows] == [(33, 64, 4096, 14336)]
    assert rows[0].algo == ALGO
    for other in (("NVIDIA H100", 130100), ("NVIDIA H200", 130200)):
        assert read_table(text, *other, torch.bfloat16) == []
    assert read_table(text, "NVIDIA H200", 130100, torch.float16) == []


@pytest.mark.parametrize(
    "change", [{"algo": "00"}, {"algo": "no hex"}, {"rows": [5, 4]}, {"rows": [0, 4]}]
)
def test_a_malformed_table_is_an_error(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not a measured product|hexadecimal"):
        read_table(table(PRODUCT | change), "NVIDIA H200", 130100, torch.bfloat16)


def test_a_table_that_lacks_something_says_what() -> None:
    lacking = {key: value for key, value in PRODUCT.items() if key != "flip"}
    with pytest.raises(ValueError, match="flip"):
        read_table(table(lacking), "NVIDIA H200", 130100, torch.bfloat16)


def test_the_table_of_the_repository_is_in_order() -> None:
    text = TABLE.read_text()
    for section in json.loads(text)["tables"]:
        dtype = getattr(torch, section["dtype"])
        assert dtype in DTYPES
        rows = read_table(text, section["gpu"], section["cublaslt"], dtype)
        assert len(rows) >= len(section["products"])
        taken = set()
        for row in rows:
            for M in range(row.rows_min, row.rows_max + 1):
                key = (M, row.outputs, row.inputs, row.residual)
                assert key not in taken, "two algorithms for one product"
                taken.add(key)


# === what is refused ===


def test_reasons_not_to_ask() -> None:
    assert problem().refusal is None
    assert problem(M=1).refusal is None
    refused = [
        problem(K=100),
        problem(N=100),
        problem(M=0),
        problem(x_stride=132),
        problem(x_stride=64),
        problem(dtype=torch.float32),
    ]
    assert all(p.refusal is not None for p in refused)


def test_devices_without_the_library_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CublasLt.available(torch.device("cpu")) == "runs on CUDA devices"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert CublasLt.available(DEVICE) == "no CUDA device is visible"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert CublasLt.available(DEVICE) == "this PyTorch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert CublasLt.available(DEVICE) == "this PyTorch was built for CUDA 12.8, not 13"


def test_a_library_that_is_not_loaded_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("headrace.ops.matmul.cublaslt_abi.SONAME", "libnowhere.so.13")
    assert "libnowhere.so.13 is not what PyTorch has loaded" in str(library())


# === on a device ===


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def expected(x: Tensor, w: Tensor, *addends: Tensor | None) -> Tensor:
    y = x.float() @ w.float().T
    for addend in addends:
        y = y if addend is None else y + addend.float()
    return y


def assert_near(actual: Tensor, wanted: Tensor) -> None:
    bound = TOLERANCE[actual.dtype] * float(wanted.abs().max())
    torch.testing.assert_close(actual.float(), wanted, rtol=0, atol=bound)


@pytest.fixture(scope="module")
def lt() -> CublasLt:
    why = CublasLt.available(DEVICE)
    if why is not None:
        pytest.skip(why)
    return CublasLt(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("rows", [1, 3, 64, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_right(lt: CublasLt, dtype: torch.dtype, rows: int, bias: bool) -> None:
    x, w = random(rows, 512, dtype=dtype), random(1024, 512, dtype=dtype)
    b = random(1024, dtype=dtype) if bias else None
    assert_near(lt.product(x, w, b), expected(x, w, b))
    residual = random(rows, 1024, dtype=dtype)
    wanted = expected(x, w, b, residual)
    assert_near(lt.product(x, w, b, residual_MN=residual), wanted)
    out = lt.product(x, w, b, out_MN=residual, residual_MN=residual)
    assert out is residual
    assert_near(residual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("flip", [False, True])
def test_every_choice_is_right(lt: CublasLt, flip: bool) -> None:
    x, w = random(96, 2048, dtype=torch.bfloat16), random(512, 2048, dtype=torch.bfloat16)
    residual = random(96, 512, dtype=torch.bfloat16)
    for added in (None, residual):
        choices = lt.choices(problem(96, 512, 2048, residual=added is not None), 8, flip=flip)
        assert choices or flip
        wanted = expected(x, w, added)
        for algo in choices:
            out = torch.full((96, 512), float("nan"), device=DEVICE, dtype=torch.bfloat16)
            lt.product_with(algo, x, w, out_MN=out, residual_MN=added)
            assert_near(out, wanted)


@pytest.mark.gpu
def test_odd_operands_are_multiplied_by_pytorch(lt: CublasLt) -> None:
    bf16 = torch.bfloat16
    wide = random(16, 1024, dtype=bf16)
    cases = [
        (random(5, 100, dtype=bf16), random(30, 100, dtype=bf16)),
        (wide[:, ::2], random(64, 512, dtype=bf16)),
        (random(5, 128, dtype=bf16), random(128, 64, dtype=bf16).T),
        (random(16, 513, dtype=bf16)[:, 1:], random(64, 512, dtype=bf16)),
        (wide.flatten()[1 : 1 + 8 * 64].view(8, 64), random(64, 64, dtype=bf16)),
    ]
    (any_algo,) = lt.choices(problem(16, 64, 512), 1)
    for x, w in cases:
        assert_near(lt.product(x, w), expected(x, w))
        out = torch.empty(x.shape[0], w.shape[0], device=DEVICE, dtype=bf16)
        assert lt.product(x, w, out_MN=out, residual_MN=torch.ones_like(out)) is out
        assert_near(out, expected(x, w) + 1)
        with pytest.raises(ValueError, match="refused"):
            lt.product_with(any_algo, x, w)
    assert lt.product(random(0, 64, dtype=bf16), random(64, 64, dtype=bf16)).shape == (0, 64)
    # Rows with room between them are the library's.
    (algo,) = lt.choices(problem(16, 64, 512, x_stride=1024), 1)
    w = random(64, 512, dtype=bf16)
    assert_near(lt.product_with(algo, wide[:, :512], w), expected(wide[:, :512], w))


@pytest.mark.gpu
def test_a_recorded_product_is_computed_anew(lt: CublasLt) -> None:
    x, w = random(64, 4096, dtype=torch.bfloat16), random(512, 4096, dtype=torch.bfloat16)
    lt.product(x, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = lt.product(x, w)
    for _ in range(2):
        x.copy_(random(64, 4096, dtype=torch.bfloat16))
        y.fill_(float("nan"))
        graph.replay()
        assert_near(y, expected(x, w))


@pytest.mark.gpu
def test_products_run_on_the_current_stream(lt: CublasLt) -> None:
    x, w = random(64, 2048, dtype=torch.bfloat16), random(512, 2048, dtype=torch.bfloat16)
    wanted = expected(x, w)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    later = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: a product on another stream would come first
        later.copy_(x)
        y = lt.product(later, w)
    stream.synchronize()
    assert_near(y, wanted)


@pytest.mark.gpu
def test_the_table_decides(tmp_path: Path, lt: CublasLt) -> None:
    problem_ = problem(64, 512, 1024)
    algo = lt.choices(problem_, 8)[-1]
    shape = {"outputs": 512, "inputs": 1024}
    entry = PRODUCT | shape | {"algo": algo.data.hex()}
    refused = entry | {"rows": [65, 80], "algo": bytes(ALGO_BYTES).hex()}
    path = tmp_path / "table.json"
    gpu = torch.cuda.get_device_name(0)
    path.write_text(table(entry, refused, gpu=gpu, cublaslt=lt.library.version))
    tuned = CublasLt(torch.device("cuda", 0), path)
    bf16 = torch.bfloat16
    assert [tuned.tuned(M, 512, 1024, bf16) for M in (32, 33, 64, 80, 81)] == [0, 1, 1, 1, 0]
    assert not tuned.tuned(64, 512, 1024, torch.float16)
    assert not tuned.tuned(64, 512, 1024, bf16, residual=True)
    w = random(512, 1024, dtype=bf16)
    for rows in (64, 72):  # the second has an algorithm that the library refuses
        x = random(rows, 1024, dtype=bf16)
        assert_near(tuned.product(x, w), expected(x, w))
    x = random(64, 1024, dtype=bf16)
    assert torch.equal(tuned.product(x, w), tuned.product_with(algo, x, w))
    (plan,) = [plan for key, plan in tuned._plans.items() if key[0] == 64 and key[-1] is None]
    assert plan is not None
    assert bytes(plan.algo) == algo.data


@pytest.mark.gpu
def test_old_plans_make_room(lt: CublasLt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "PLANS_MAX", 2)
    w = random(64, 64, dtype=torch.bfloat16)
    few = CublasLt(lt.device)
    for rows in (1, 2, 3, 1):
        x = random(rows, 64, dtype=torch.bfloat16)
        assert_near(few.product(x, w), expected(x, w))
        assert len(few._plans) <= 2

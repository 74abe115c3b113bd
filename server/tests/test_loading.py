"""The threaded way from files to tensors gives what the plain one gives, whatever the chunks."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.comm import SingleComm
from headrace.device.cpu import CpuDevice
from headrace.device.weights import HostStager, WeightStager
from headrace.errors import CheckpointError, DeviceError
from headrace.layers.build import Build
from headrace.memory import Room
from headrace.models import ARCHITECTURES, begin_loading, load_model, read_spec
from headrace.models.decoder import Decoder
from headrace.ops import select
from headrace.testing.tiny import Tiny
from headrace.weights import SafetensorsReader, list_wants, read_wants, start_files
from headrace.weights.checkpoint import read_headers
from headrace.weights.loading import DummyLoading
from headrace.weights.plan import plan_reads
from headrace.weights.want import Want, check_coverage

WHOLE = 1 << 20
CHUNKS = (1, 100, 1000, 4096, WHOLE)
MODEL = "model.safetensors"


class CopyingStager(HostStager):
    """Spoils a buffer when it is given back: a copy that was late would show."""

    def to_device(self, host: Tensor) -> Tensor:
        return host.clone()

    def copying(self, buffer: Any) -> Any:
        manager = super().copying(buffer)

        class Spoiling:
            def __enter__(self) -> None:
                manager.__enter__()

            def __exit__(self, *error: Any) -> None:
                buffer.array[:] = 0xFF
                manager.__exit__(*error)

        return Spoiling()


class StagedCpu(CpuDevice):
    """A CPU that is loaded as if its memory were elsewhere."""

    asynchronous = True

    def weight_stager(self, buffer_bytes: int, buffers: int) -> WeightStager:
        return CopyingStager(buffer_bytes, buffers)


class Rank(SingleComm):
    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size


def wanted(folder: Path, dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> tuple[Any, ...]:
    """The wants of a folder's model, and its architecture's names."""
    from importlib import import_module

    spec = read_spec(folder)
    module = import_module(f"headrace.models.{ARCHITECTURES[spec.architecture]}")
    table = select(spec.op_spec(dtype, ranks), CpuDevice(1), reference=True)
    build = Build(table, Rank(rank, ranks), dtype)
    names = module.NAMES.tie() if spec.tied else module.NAMES
    return list_wants(Decoder(build, spec, module.RECIPE), names), names


def both(
    folder: Path, dtype: torch.dtype, chunk: int, rank: int = 0, ranks: int = 1, readers: int = 3
) -> tuple[list[Want], list[Tensor], list[Tensor]]:
    """The wants, and what the plain way and the threaded one make of them."""
    wants, names = wanted(folder, dtype, rank, ranks)
    plain = read_wants(wants, names, SafetensorsReader(folder))
    loading = start_files(wants, names, folder, StagedCpu(1), readers=readers, chunk_bytes=chunk)
    return wants, plain, loading.wait()


def assert_equal(wants: list[Want], plain: list[Tensor], staged: list[Tensor]) -> None:
    for want, one, other in zip(wants, plain, staged, strict=True):
        assert other.dtype == want.dtype and other.is_contiguous()
        assert torch.equal(one, other), want.parameters


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_ways_give_the_same_bits(tmp_path: Path, architecture: str, chunk: int) -> None:
    folder = Tiny(architecture, dtype=torch.bfloat16).write(tmp_path)
    assert_equal(*both(folder, torch.bfloat16, chunk))


@pytest.mark.parametrize("chunk", (100, 1000, WHOLE))
@pytest.mark.parametrize("rank", range(4))
def test_each_rank_has_its_rows_and_columns(tmp_path: Path, rank: int, chunk: int) -> None:
    folder = Tiny("Qwen2ForCausalLM", dtype=torch.bfloat16, shards=3).write(tmp_path)
    assert_equal(*both(folder, torch.bfloat16, chunk, rank, 4))


@pytest.mark.parametrize("stored", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("ranks", (1, 2))
def test_numbers_are_converted(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, ranks: int
) -> None:
    folder = Tiny(dtype=stored, shards=2).write(tmp_path)
    assert_equal(*both(folder, dtype, 1000, ranks - 1, ranks))


def test_a_tied_head_is_read_once(tmp_path: Path) -> None:
    folder = Tiny(tied=True, dtype=torch.bfloat16).write(tmp_path)
    wants, plain, staged = both(folder, torch.bfloat16, WHOLE)
    assert_equal(wants, plain, staged)
    (tied,) = [want for want in wants if len(want.parameters) == 2]
    assert set(tied.parameters) == {"embed.weight", "head.weight"}
    plan = plan_reads(wants, read_headers(folder), WHOLE)
    assert plan.nbytes <= (folder / MODEL).stat().st_size


def test_padding_is_zeros(tmp_path: Path) -> None:
    folder = Tiny(vocab_size=509, dtype=torch.bfloat16).write(tmp_path)
    for rank in range(4):
        wants, plain, staged = both(folder, torch.bfloat16, 777, rank, 4)
        assert_equal(wants, plain, staged)
        head = next(i for i, want in enumerate(wants) if "head.weight" in want.parameters)
        assert staged[head].shape[0] == 128
        assert staged[head][509 - 128 * rank :].count_nonzero() == 0 or rank < 3


def test_tensors_of_several_sizes_share_reads_and_are_aligned(tmp_path: Path) -> None:
    """Odd lengths of two-byte numbers before four-byte ones."""
    folder = Tiny(dtype=torch.bfloat16).write(tmp_path)
    tensors = load_file(folder / MODEL)
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] = tensors[name].float()
    save_file(tensors, folder / MODEL)
    assert_equal(*both(folder, torch.bfloat16, 3001))
    wants, _ = wanted(folder, torch.bfloat16)
    plan = plan_reads(wants, read_headers(folder), WHOLE)
    assert len(plan.reads) < len(wants)
    for read in plan.reads:
        assert all(copy.at % copy.dtype.itemsize == 0 for copy in read.copies)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_reads_are_bounded_and_cover_each_byte_once(tmp_path: Path, chunk: int) -> None:
    folder = Tiny(dtype=torch.bfloat16, shards=2).write(tmp_path)
    wants, _ = wanted(folder, torch.bfloat16)
    stored = read_headers(folder)
    plan = plan_reads(wants, stored, chunk)
    widest = max(want.shape[-1] * 2 for want in wants if len(want.shape) == 2)
    assert plan.buffer_bytes == max(chunk, widest)
    assert all(read.nbytes <= plan.buffer_bytes for read in plan.reads)
    copied = sum(copy.nbytes for read in plan.reads for copy in read.copies)
    assert copied == sum(tensor.nbytes for tensor in stored.values()) == plan.nbytes


def test_a_divided_tensor_is_not_read_whole(tmp_path: Path) -> None:
    folder = Tiny(kv_heads=8, vocab_size=512, dtype=torch.bfloat16).write(tmp_path)
    stored = read_headers(folder)
    plans = [
        plan_reads(wanted(folder, torch.bfloat16, rank, 4)[0], stored, 512) for rank in range(4)
    ]
    by_rows = sum(
        tensor.nbytes
        for name, tensor in stored.items()
        if len(tensor.shape) == 2 and "o_proj" not in name and "down_proj" not in name
    )
    whole = sum(tensor.nbytes for tensor in stored.values()) - by_rows
    assert [plan.nbytes for plan in plans] == [by_rows // 4 + whole] * 4


def test_a_model_is_loaded_by_threads_and_answers_the_same(tmp_path: Path) -> None:
    folder = Tiny(dtype=torch.bfloat16).write(tmp_path)
    weights: list[Tensor] = []
    for device in (CpuDevice(1), StagedCpu(1)):
        ops = select(read_spec(folder).op_spec(torch.bfloat16, 1), device, reference=True)
        keys: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "load_format": "auto"}
        early = begin_loading(folder, rank=0, ranks=1, **keys)
        assert (early is None) == (not device.asynchronous)
        model = load_model(folder, comm=SingleComm(), ops=ops, loading=early, **keys)
        assert model.head.method is not None
        weights.append(model.head.method.dequantize())
    assert torch.equal(*weights)


def message(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """What the plain way and the threaded one say against a folder."""
    wants, names = wanted(folder, dtype)
    said: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        read_wants(wants, names, SafetensorsReader(folder))
    said.append(str(caught.value))
    with pytest.raises(CheckpointError) as caught:
        start_files(wants, names, folder, StagedCpu(1)).wait()
    said.append(str(caught.value))
    return said[0], said[1]


def change(folder: Path, **changes: Tensor | None) -> None:
    tensors = load_file(folder / MODEL) | {k: v for k, v in changes.items() if v is not None}
    save_file({k: v for k, v in tensors.items() if changes.get(k, v) is not None}, folder / MODEL)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.norm.weight": None, "model.extra.weight": torch.zeros(3)},
        {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 95)},
        {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 96, dtype=torch.int32)},
        {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 96).to(torch.float8_e4m3fn)},
    ],
)
def test_both_ways_refuse_in_the_same_words(
    tmp_path: Path, changes: dict[str, Tensor | None]
) -> None:
    folder = Tiny(dtype=torch.bfloat16).write(tmp_path)
    change(folder, **changes)
    plain, staged = message(folder)
    assert plain == staged
    assert "model." in plain


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = Tiny(shards=2, dtype=torch.bfloat16).write(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.zeros(64)}, folder / "more.safetensors")
    plain, staged = message(folder)
    assert plain == staged
    assert "model.norm.weight stands in both" in plain


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    data = (folder / MODEL).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(folder: Path, header: str, tail: bytes, length: int | None = None) -> None:
    data = header.encode()
    (folder / MODEL).write_bytes(struct.pack("<Q", length or len(data)) + data + tail)


@pytest.mark.parametrize(
    "case", ["truncated", "empty", "length", "json", "dtype", "offsets", "shape", "twice"]
)
def test_broken_files_are_named(tmp_path: Path, case: str) -> None:
    folder = Tiny(dtype=torch.bfloat16).write(tmp_path)
    header, tail = header_of(folder)
    entry = header["model.norm.weight"]
    if case == "truncated":
        tail = tail[:-10]
    elif case == "dtype":
        entry["dtype"] = "Q3"
    elif case == "offsets":
        entry["data_offsets"][1] += 2
    elif case == "shape":
        entry["shape"] = [-64]
    text = json.dumps(header)
    if case == "json":
        text = text[:-1]
    if case == "twice":
        text = text[:-1] + ', "model.norm.weight": ' + json.dumps(entry) + "}"
    rewrite(folder, text, tail, 1 << 40 if case == "length" else None)
    if case == "empty":
        (folder / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: "):
        read_headers(folder)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    folder = Tiny(dtype=torch.bfloat16).write(tmp_path)
    wants, names = wanted(folder, torch.bfloat16)
    stored = read_headers(folder)
    check_coverage(wants, names, set(stored))
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-100])
    plan = plan_reads(wants, stored, 1000)
    from headrace.weights.loading import FileLoading

    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: it ends"):
        FileLoading(wants, plan, StagedCpu(1), readers=2).wait()


def test_a_missing_file_of_an_index_is_named(tmp_path: Path) -> None:
    folder = Tiny(shards=2).write(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    plain, staged = message(folder)
    assert plain == staged
    assert "model-00002-of-00002.safetensors is missing" in plain


class FullCpu(StagedCpu):
    def room(self) -> Room:
        return Room(total=1000, free=10)


def test_a_device_without_room_is_told_so(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    wants, names = wanted(folder, torch.float32)
    with pytest.raises(DeviceError, match=r"the weights take 0\.00 GB"):
        start_files(wants, names, folder, FullCpu(1))


@pytest.mark.parametrize("ranks", (2, 4))
def test_dummy_weights_of_ranks_are_parts_of_one_model(tmp_path: Path, ranks: int) -> None:
    folder = Tiny(kv_heads=8, vocab_size=512).write(tmp_path)
    wants, _ = wanted(folder, torch.bfloat16)
    made = DummyLoading(wants, StagedCpu(1)).wait()
    alone = {want.parameters: value for want, value in zip(wants, made, strict=True)}
    for rank in range(ranks):
        share, _ = wanted(folder, torch.bfloat16, rank, ranks)
        for want, value in zip(share, DummyLoading(share, StagedCpu(1)).wait(), strict=True):
            whole = alone[want.parameters]
            parts = whole.split([p.full for p in want.split.parts], want.split.dim)
            mine = [
                part.narrow(want.split.dim, p.start, p.size)
                for part, p in zip(parts, want.split.parts, strict=True)
            ]
            assert torch.equal(value, torch.cat(mine, want.split.dim)), want.parameters


def test_dummy_weights_are_small_numbers_and_norms_are_ones(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    wants, _ = wanted(folder, torch.bfloat16)
    for want, value in zip(wants, DummyLoading(wants, StagedCpu(1)).wait(), strict=True):
        if value.dim() == 1:
            assert value.eq(1).all()
        elif not list(want.padding()):
            assert 0.01 < value.float().std() < 0.03, want.parameters

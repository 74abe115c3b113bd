"""Where each tensor of a folder's safetensors files lies, by the files' headers.

The format: eight bytes, little-endian, say how long the header is; the header is a JSON object from
names to `dtype`, `shape` and `data_offsets`, which count from the header's end; then the tensors.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headrace.errors import CheckpointError

_WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The format's own limit of a header.
_HEADER_BYTES_MAX = 100_000_000
_METADATA = "__metadata__"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the beginning of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_fit(
    where: object,
    name: str,
    found: tuple[tuple[int, ...], torch.dtype],
    expected: tuple[tuple[int, ...], torch.dtype],
) -> None:
    """Refuses a tensor of another shape, or one whose numbers do not convert.

    Floating-point numbers convert to each other; anything else is what it is.
    """
    check_shape(where, name, found[0], expected[0])
    dtype, wanted = found[1], expected[1]
    if dtype == wanted or (_is_real(dtype) and _is_real(wanted)):
        return
    raise CheckpointError(f"{where}: {name} holds {_short(dtype)}, expected {_short(wanted)}")


def check_shape(
    where: object, name: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Refuses a tensor of another shape.

    Whether a scale is a number, a row or a column of one is a matter of taste: dimensions of one at
    the end do not count.
    """
    if _trimmed(found) != _trimmed(expected):
        raise CheckpointError(f"{where}: {name} has shape {list(found)}, expected {list(expected)}")


def find_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """Returns the names of a checkpoint's files, and which of them the index gives each tensor."""
    index = folder / INDEX
    if index.is_file():
        try:
            file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return sorted(set(file_of.values())), file_of
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error!r}") from error
    # Some folders hold the weights a second time, in another layout under another name.
    if (folder / _WHOLE).is_file():
        return [_WHOLE], None
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file")
    return files, None


def choose_files(
    folder: Path, held: dict[str, set[str]], file_of: dict[str, str] | None
) -> dict[str, str]:
    """Returns the file of each tensor there is; one that stands in two files is refused.

    Args:
        held: the tensors of each file.
        file_of: what the index says, if there is one. It may promise what a file does not hold.
    """
    if file_of is not None:
        return {name: file for name, file in file_of.items() if name in held[file]}
    chosen: dict[str, str] = {}
    for file, names in held.items():
        for name in names:
            other = chosen.setdefault(name, file)
            if other != file:
                raise CheckpointError(f"{folder}: {name} stands in both {other} and {file}")
    return chosen


def read_headers(folder: Path) -> dict[str, Stored]:
    """Returns every tensor of a folder by its name; a CheckpointError names the bad file."""
    files, file_of = find_files(folder)
    headers = {file: _header(folder / file) for file in files}
    held = {file: set(header) for file, header in headers.items()}
    chosen = choose_files(folder, held, file_of)
    return {name: headers[file][name] for name, file in chosen.items()}


def _header(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_HEADER_BYTES_MAX, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(file.read(length), object_pairs_hook=_unique)
        stored = {
            name: _stored(path, name, entry, 8 + length, size)
            for name, entry in entries.items()
            if name != _METADATA
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, and {INDEX} names it") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return stored


def _stored(path: Path, name: str, entry: Any, base: int, size: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is stored in {entry['dtype']}")
    begin, end = entry["data_offsets"]
    # A number alone is read as a row of one.
    shape = tuple(entry["shape"]) or (1,)
    stored = Stored(name, path, DTYPES[entry["dtype"]], shape, base + begin)
    if begin < 0 or end - begin != stored.nbytes or any(n < 0 for n in stored.shape):
        raise ValueError(f"{name} has {end - begin} bytes where its shape needs {stored.nbytes}")
    if base + end > size:
        raise ValueError(f"{name} ends at byte {base + end} of a file of {size}")
    return stored


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands twice in the header")
    return values


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def _is_real(dtype: torch.dtype) -> bool:
    # Numbers of eight bits mean nothing without their scales.
    return dtype.is_floating_point and dtype.itemsize > 1


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

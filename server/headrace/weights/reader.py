"""Checkpoint tensors by name, a slice at a time: a rank reads its part and no more."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import CheckpointError

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Reader(Protocol):
    """Where weights come from."""

    def names(self) -> set[str] | None:
        """Returns the tensors there are; None if there are as many as are asked for."""
        ...

    def read(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Tensor:
        """Returns the range [start, stop) of a tensor along `dim`, on the host.

        A tensor whose whole shape is not `shape` is a CheckpointError.
        """
        ...


class SafetensorsReader:
    """A folder with one safetensors file, or several and an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = self._find()

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Tensor:
        file = self._file_of[name]
        view = self._open(file).get_slice(name)
        found = tuple(view.get_shape())
        if found != shape:
            raise CheckpointError(
                f"{self._folder / file}: {name} has shape {list(found)}, expected {list(shape)}"
            )
        try:
            return view[start:stop] if dim == 0 else view[:, start:stop]
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / file}: {name}: {error}") from error

    def _find(self) -> dict[str, str]:
        """Returns the file of each tensor."""
        index = self._folder / _INDEX
        if index.is_file():
            try:
                file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index} cannot be read: {error!r}") from error
            # The index may promise what a file does not hold: what is there counts.
            held = {file: set(self._open(file).keys()) for file in set(file_of.values())}
            return {name: file for name, file in file_of.items() if name in held[file]}
        # Some folders hold the weights a second time, in another layout under another name.
        whole = [_WHOLE] if (self._folder / _WHOLE).is_file() else None
        files = whole or sorted(path.name for path in self._folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self._folder} holds no *.safetensors file")
        return {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            try:
                self._files[file] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing, and {_INDEX} names it") from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return self._files[file]


class DummyReader:
    """Random weights that depend on nothing but a tensor's name and shape."""

    # Odd, so that rows of the usual widths do not repeat each other.
    _TILE = (1 << 20) + 7
    _STD = 0.02

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tile = torch.randn(self._TILE, generator=generator) * self._STD

    def names(self) -> None:
        return None

    def read(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Tensor:
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(stop - start)  # a norm
        size = math.prod(shape)
        offset = zlib.crc32(name.encode()) % self._TILE
        tile = self._tile.repeat(-(-(size + offset) // self._TILE))
        return tile[offset : offset + size].view(shape).narrow(dim, start, stop - start).clone()

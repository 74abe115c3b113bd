"""Checkpoint tensors by name, a slice at a time: a rank reads its part and no more."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.weights.checkpoint import INDEX, check_shape, choose_files, find_files


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

    def where(self, name: str) -> str:
        """Returns where a tensor is kept, for errors."""
        ...


class SafetensorsReader:
    """A folder with one safetensors file, or several and an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        files, file_of = find_files(folder)
        held = {file: set(self._open(file).keys()) for file in files}
        self._file_of = choose_files(folder, held, file_of)

    def names(self) -> set[str]:
        return set(self._file_of)

    def read(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Tensor:
        file = self._file_of[name]
        view = self._open(file).get_slice(name)
        found = tuple(view.get_shape())
        check_shape(self._folder / file, name, found, shape)
        try:
            if found == ():
                return self._open(file).get_tensor(name).view(1)
            return view[start:stop] if dim == 0 else view[:, start:stop]
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder / file}: {name}: {error}") from error

    def where(self, name: str) -> str:
        return str(self._folder / self._file_of[name])

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            try:
                self._files[file] = safe_open(path, framework="pt", device="cpu")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing, and {INDEX} names it") from None
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
        return self._files[file]


class DummyReader:
    """Random weights that depend on nothing but a tensor's name and shape, made on the host."""

    # Odd, so that rows of the usual widths do not repeat each other.
    _TILE = (1 << 20) + 7
    _STD = 0.02

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tile = torch.randn(self._TILE, generator=generator) * self._STD

    def names(self) -> None:
        return None

    def where(self, name: str) -> str:
        return name

    def read(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Tensor:
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(stop - start)  # a norm
        size = math.prod(shape)
        offset = zlib.crc32(name.encode()) % self._TILE
        tile = self._tile.repeat(-(-(size + offset) // self._TILE))
        return tile[offset : offset + size].view(shape).narrow(dim, start, stop - start).clone()

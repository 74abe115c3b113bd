"""Which bytes of which file go to which rows and columns of which tensor, in reads of bounded size.

Tensors that lie next to each other in a file share a read; large ones are cut into many. A range of
rows is read alone; a range of columns is cut out of whole rows on the device, because reading a
file row by row costs more than the bus has to spare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from headrace.weights.checkpoint import Stored, check_fit
from headrace.weights.want import Piece, Want

# Bytes between two tensors that are read and dropped rather than skipped by a new read.
_GAP_MAX = 64 << 10


@dataclass(frozen=True)
class Copy:
    """Whole rows of a stored tensor, as they lie in a read, and where their columns go."""

    at: int  # bytes from the beginning of the read
    dtype: torch.dtype
    rows: int
    width: int  # numbers in a stored row
    first: int  # the columns that are wanted: [first, last)
    last: int
    want: int  # index of the tensor that receives them, seen as a matrix
    row: int  # where they go in it
    column: int

    @property
    def nbytes(self) -> int:
        return self.rows * self.width * self.dtype.itemsize


@dataclass
class Read:
    """A range of one file."""

    path: Path
    offset: int
    nbytes: int = 0
    copies: list[Copy] = field(default_factory=list[Copy])


@dataclass(frozen=True)
class ReadPlan:
    """All reads, in the files' order, none larger than `buffer_bytes`."""

    reads: tuple[Read, ...]
    buffer_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(read.nbytes for read in self.reads)


@dataclass(frozen=True)
class _Run:
    """A piece as rows of a matrix, before it is cut into reads."""

    stored: Stored
    offset: int  # of the first row, in the file
    rows: int
    width: int
    first: int
    last: int
    want: int
    row: int
    column: int

    @property
    def row_bytes(self) -> int:
        return self.width * self.stored.dtype.itemsize


def plan_reads(wants: list[Want], stored: Mapping[str, Stored], chunk_bytes: int) -> ReadPlan:
    """Plans what a rank reads; a tensor that does not fit is a CheckpointError.

    Args:
        stored: where each tensor lies; all sources of all wants are there.
        chunk_bytes: how large a read may be, unless one row is larger.
    """
    runs = [
        run
        for number, want in enumerate(wants)
        for piece in want.pieces()
        for run in [_run(number, want, piece, stored[piece.source])]
        if run.rows * run.row_bytes > 0
    ]
    runs.sort(key=lambda run: (run.stored.path, run.offset))
    buffer_bytes = max([chunk_bytes, *(run.row_bytes for run in runs)])
    return ReadPlan(tuple(_cut(runs, buffer_bytes)), buffer_bytes)


def _run(number: int, want: Want, piece: Piece, stored: Stored) -> _Run:
    found, expected = (stored.shape, stored.dtype), (piece.full, want.dtype)
    check_fit(stored.path, piece.source, found, expected)
    rows, width = stored.shape[0], math.prod(stored.shape[1:])
    if want.split.dim == 0:
        skipped = piece.start * width * stored.dtype.itemsize
        here = (stored.offset + skipped, piece.stop - piece.start, width)
        return _Run(stored, *here, 0, width, number, piece.at, 0)
    assert want.split.dim == 1 and len(stored.shape) == 2, "columns are those of a matrix"
    here = (stored.offset, rows, width)
    return _Run(stored, *here, piece.start, piece.stop, number, 0, piece.at)


def _cut(runs: list[_Run], buffer_bytes: int) -> Iterator[Read]:
    """Fills one read after the other with whole rows."""
    read: Read | None = None
    for run in runs:
        done = 0
        while done < run.rows:
            offset = run.offset + done * run.row_bytes
            fitting = 0 if read is None else _fitting(read, run, offset, buffer_bytes)
            if read is None or fitting == 0:
                if read is not None:
                    yield read
                read = Read(run.stored.path, offset)
                fitting = buffer_bytes // run.row_bytes
            rows = min(fitting, run.rows - done)
            at = offset - read.offset
            place = (run.first, run.last, run.want, run.row + done, run.column)
            read.copies.append(Copy(at, run.stored.dtype, rows, run.width, *place))
            read.nbytes = at + rows * run.row_bytes
            done += rows
    if read is not None:
        yield read


def _fitting(read: Read, run: _Run, offset: int, buffer_bytes: int) -> int:
    """How many rows from `offset` on a read has room for; 0 if they do not follow what it has."""
    at = offset - read.offset
    gap = at - read.nbytes
    if read.path != run.stored.path or not 0 <= gap <= _GAP_MAX or at >= buffer_bytes:
        return 0
    if at % run.stored.dtype.itemsize != 0:  # A tensor's view of the buffer must be aligned.
        return 0
    return (buffer_bytes - at) // run.row_bytes

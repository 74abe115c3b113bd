"""From checkpoint files to a decoder's parameters."""

from headrace.weights.load import assign, pack, read_wants
from headrace.weights.loading import DummyLoading, Loading, readers_of, start_files
from headrace.weights.names import Names
from headrace.weights.reader import DummyReader, Reader, SafetensorsReader
from headrace.weights.want import Want, list_wants

__all__ = [
    "DummyLoading",
    "DummyReader",
    "Loading",
    "Names",
    "Reader",
    "SafetensorsReader",
    "Want",
    "assign",
    "list_wants",
    "pack",
    "read_wants",
    "readers_of",
    "start_files",
]

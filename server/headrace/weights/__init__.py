"""From checkpoint files to a decoder's parameters."""

from headrace.weights.load import load
from headrace.weights.names import Names
from headrace.weights.reader import DummyReader, Reader, SafetensorsReader

__all__ = ["DummyReader", "Names", "Reader", "SafetensorsReader", "load"]

"""Quantisation formats: how linear layers are stored, and which op runs them."""

from headrace.quant.base import LinearMethod, LinearShape, QuantFormat, Scheme
from headrace.quant.detect import PLAIN, detect
from headrace.quant.none import Plain
from headrace.quant.parameter import Declares, Part, Split

__all__ = [
    "PLAIN",
    "Declares",
    "LinearMethod",
    "LinearShape",
    "Part",
    "Plain",
    "QuantFormat",
    "Scheme",
    "Split",
    "detect",
]

"""`headrace quantize`: a checkpoint of 16 bits to one of four, by GPTQ; beside the server."""

from headrace.quantize.command import main

__all__ = ["main"]

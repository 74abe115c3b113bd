"""Drawing a token from each row of logits, with what is told about it."""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.device.base import Device
from headrace.ops.sampling.base import (
    IN_PROMPT,
    Alternatives,
    Edits,
    Feature,
    Knobs,
    SampleRows,
    Samples,
    SamplingBackend,
    uniform,
)
from headrace.ops.sampling.batched import BatchedSampling
from headrace.ops.sampling.reference import ReferenceSampling

__all__ = [
    "IN_PROMPT",
    "Alternatives",
    "Edits",
    "Feature",
    "Knobs",
    "SampleRows",
    "Samples",
    "SamplingBackend",
    "select",
    "uniform",
]


def select(device: Device, reference: bool = False) -> SamplingBackend:
    """The sampler of a device; the reference if it is asked for."""
    if reference:
        return ReferenceSampling()
    return BatchedSampling(_host_argmax if device.kind == "cpu" else _argmax)


def _host_argmax(x_SV: Tensor) -> Tensor:
    # NumPy's is vectorised, PyTorch's is not: a tenth of the time.
    return torch.from_numpy(x_SV.numpy().argmax(1))


def _argmax(x_SV: Tensor) -> Tensor:
    return x_SV.argmax(1)

"""Drawing a token from each row of logits, with what is told about it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from headrace.device.base import Device
from headrace.device.peers import Share
from headrace.ops.sampling.base import (
    IN_PROMPT,
    Alternatives,
    Edits,
    Feature,
    Knobs,
    Masks,
    SampleRows,
    Samples,
    SamplingBackend,
    SharedSampling,
    empty_samples,
    uniform,
)
from headrace.ops.sampling.batched import BatchedSampling, Search
from headrace.ops.sampling.reference import ReferenceSampling
from headrace.ops.sampling.watermark import Watermark
from headrace.ops.triton import gpu, why_not

__all__ = [
    "IN_PROMPT",
    "Alternatives",
    "Edits",
    "Feature",
    "Knobs",
    "Masks",
    "SampleRows",
    "Samples",
    "SamplingBackend",
    "SharedSampling",
    "Watermark",
    "empty_samples",
    "select",
    "shared_sampling",
    "uniform",
]


def select(device: Device, reference: bool = False) -> SamplingBackend:
    """The sampler of a device; the reference if it is asked for."""
    if reference:
        return ReferenceSampling()
    # NumPy's searches are vectorised, PyTorch's on the CPU are not: a tenth of the time.
    if device.kind == "cpu":
        return BatchedSampling(Search(_host_argmax, _host_at_least))
    if why_not(device) is not None:
        return BatchedSampling(Search(_argmax, _at_least))
    from headrace.ops.sampling.triton import TritonSampling

    return TritonSampling(gpu(device), device.to_device)


def shared_sampling(
    backend: SamplingBackend, device: Device, share: Share, ranks: int, vocab: int, columns: int
) -> SharedSampling | None:
    """How ranks find tokens of a vocabulary that they share; None where they gather it.

    All ranks call it.

    Args:
        backend: this rank's, by `select`.
        columns: of the vocabulary on each rank, padding included.
    """
    if ranks == 1 or device.kind == "cpu" or why_not(device) is not None:
        return None
    from headrace.ops.sampling import ranks as of_ranks
    from headrace.ops.sampling.triton import TritonSampling

    if not isinstance(backend, TritonSampling):
        return None
    return of_ranks.make(backend, gpu(device), share, ranks, vocab, columns)


def _host_argmax(x_RV: Tensor) -> Tensor:
    return torch.from_numpy(x_RV.numpy().argmax(1))


def _host_at_least(x_RV: Tensor, bound_R1: Tensor) -> tuple[Tensor, Tensor]:
    found = np.flatnonzero(x_RV.numpy() >= bound_R1.numpy())
    row_X, token_X = np.divmod(found, x_RV.shape[1])
    return torch.from_numpy(row_X), torch.from_numpy(token_X)


def _argmax(x_RV: Tensor) -> Tensor:
    return x_RV.argmax(1)


def _at_least(x_RV: Tensor, bound_R1: Tensor) -> tuple[Tensor, Tensor]:
    row_X, token_X = (x_RV >= bound_R1).nonzero(as_tuple=True)
    return row_X, token_X

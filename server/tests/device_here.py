"""Where tests of kernels run: on a CUDA device, else in Triton's interpreter."""

from __future__ import annotations

import torch

from conftest import CUDA
from headrace.ops.triton import INTERPRETED, Gpu, gpu_at

DEVICE = torch.device("cuda" if CUDA else "cpu")


def device_gpu() -> Gpu:
    return gpu_at(DEVICE) if CUDA else INTERPRETED

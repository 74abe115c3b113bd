"""Triton kernels run in Triton's interpreter where there is no CUDA device to run them on."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    # Read when a kernel is decorated, so it has to be set before any module with kernels is
    # imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA:
        return
    skip = pytest.mark.skip(reason="no CUDA device is visible")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)

"""The matrix product on CUDA: kernels of our own where rows are few, cuBLAS where they are not.

Which of them serves how many rows is settled by tables of what was measured (`settings.py`, and
for cuBLASLt's algorithms `cublaslt.json`); nothing is tuned at start.
"""

# T tokens · Y outputs · X inputs · F mlp width

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.matmul.cublaslt import CublasLt
from headrace.ops.matmul.settings import (
    BUCKETS,
    ROWS_MAX,
    Setting,
    best,
    best_gated,
    bucket_of,
)
from headrace.ops.matmul.skinny import Scratch, product
from headrace.ops.triton import PDL_CAPABILITY, Gpu

_NONE = (None,) * len(BUCKETS)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight as the checkpoint has it, and what multiplies it."""

    weight_YX: Tensor
    # By number of rows, up to ROWS_MAX: the setting, or None for cuBLAS.
    settings: tuple[Setting | None, ...]
    settings_gated: tuple[Setting | None, ...]


class CudaMatmul:
    """See `MatmulBackend`, `GatedMatmul` and `IntoMatmul`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._scratch: Scratch | None = None
        self._lt: CublasLt | None = None

    def pack(self, weight_YX: Tensor) -> PackedWeight:
        weight_YX = weight_YX.detach().contiguous()
        outputs, inputs = weight_YX.shape
        settings = settings_gated = _NONE
        if self._gpu.capability >= PDL_CAPABILITY and weight_YX.dtype != torch.float32:
            settings = best(outputs, inputs)
            if outputs % 2 == 0:
                settings_gated = best_gated(outputs // 2, inputs)
        return self.pack_as(weight_YX, settings, settings_gated)

    def pack_as(
        self,
        weight_YX: Tensor,
        settings: tuple[Setting | None, ...],
        settings_gated: tuple[Setting | None, ...] = _NONE,
    ) -> PackedWeight:
        """Packs a contiguous weight for the settings given, one a bucket."""
        if self._scratch is None:
            self._scratch = Scratch(weight_YX.device)
            if CublasLt.available(weight_YX.device) is None:
                self._lt = CublasLt(weight_YX.device)
        for setting in settings:
            if setting is not None:
                self._scratch.reserve(setting, weight_YX.shape[0])
        return PackedWeight(weight_YX, _by_rows(settings), _by_rows(settings_gated))

    def apply(self, x_TX: Tensor, packed: PackedWeight, bias_Y: Tensor | None) -> Tensor:
        rows = x_TX.shape[0]
        setting = packed.settings[rows] if rows <= ROWS_MAX else None
        if setting is not None:
            assert self._scratch is not None, "a weight is packed before it is applied"
            return product(x_TX, packed.weight_YX, bias_Y, setting, self._scratch, self._gpu)
        chosen = self._chosen(x_TX, packed)
        if chosen is not None:
            return chosen.product(x_TX, packed.weight_YX, bias_Y)
        return F.linear(x_TX, packed.weight_YX, bias_Y)

    def apply_into(self, x_TX: Tensor, packed: PackedWeight, out_TY: Tensor) -> None:
        rows, weight_YX = x_TX.shape[0], packed.weight_YX
        setting = packed.settings[rows] if rows <= ROWS_MAX else None
        if setting is not None:
            assert self._scratch is not None, "a weight is packed before it is applied"
            product(x_TX, weight_YX, None, setting, self._scratch, self._gpu, out_TY)
            return
        chosen = self._chosen(x_TX, packed)
        if chosen is not None:
            chosen.product(x_TX, weight_YX, None, out_TY)
        else:
            torch.mm(x_TX, weight_YX.T, out=out_TY)

    def _chosen(self, x_TX: Tensor, packed: PackedWeight) -> CublasLt | None:
        """cuBLASLt, where an algorithm was measured to be faster than the library's own choice."""
        if self._lt is None:
            return None
        outputs, inputs = packed.weight_YX.shape
        return self._lt if self._lt.tuned(x_TX.shape[0], outputs, inputs, x_TX.dtype) else None

    def apply_gated(self, x_TX: Tensor, packed: PackedWeight) -> Tensor | None:
        rows = x_TX.shape[0]
        setting = packed.settings_gated[rows] if rows <= ROWS_MAX else None
        if setting is None:
            return None
        assert self._scratch is not None, "a weight is packed before it is applied"
        return product(x_TX, packed.weight_YX, None, setting, self._scratch, self._gpu)


def _by_rows(settings: tuple[Setting | None, ...]) -> tuple[Setting | None, ...]:
    """From one a bucket to one a number of rows; no rows are cuBLAS's."""
    return (None, *(settings[bucket_of(rows)] for rows in range(1, ROWS_MAX + 1)))

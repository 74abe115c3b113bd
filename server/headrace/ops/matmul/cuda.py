"""The matrix product on CUDA: cuBLAS, and kernels of our own where rows are few.

Which of them serves how many rows is settled when a weight is packed (`settings.py`); nothing is
tuned at start.
"""

# T tokens · Y outputs · X inputs · F mlp width

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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
        for setting in settings:
            if setting is not None:
                self._scratch.reserve(setting, weight_YX.shape[0], self._gpu.multiprocessors)
        return PackedWeight(weight_YX, _by_rows(settings), _by_rows(settings_gated))

    def apply(self, x_TX: Tensor, packed: PackedWeight, bias_Y: Tensor | None) -> Tensor:
        rows = x_TX.shape[0]
        setting = packed.settings[rows] if rows <= ROWS_MAX else None
        if setting is None:
            return F.linear(x_TX, packed.weight_YX, bias_Y)
        assert self._scratch is not None, "a weight is packed before it is applied"
        return product(x_TX, packed.weight_YX, bias_Y, setting, self._scratch, self._gpu)

    def apply_into(self, x_TX: Tensor, packed: PackedWeight, out_TY: Tensor) -> None:
        rows = x_TX.shape[0]
        setting = packed.settings[rows] if rows <= ROWS_MAX else None
        if setting is None:
            torch.mm(x_TX, packed.weight_YX.T, out=out_TY)
            return
        assert self._scratch is not None, "a weight is packed before it is applied"
        product(x_TX, packed.weight_YX, None, setting, self._scratch, self._gpu, out_TY)

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

"""The masks of a step's constrained rows, from the router's bytes to the device (R7)."""

# S rows of the plan · R sampled rows · M rows with a mask · W words

from __future__ import annotations

import numpy as np
import torch

from headrace.batch import Step
from headrace.device import Device
from headrace.errors import PlanError
from headrace.ops.sampling import Masks
from headrace.wire import Mask

# Tokens of a word.
WORD_TOKENS = 32


def mask_bytes(rows: int, vocab_size: int) -> int:
    """What `MaskBuffer` takes of the device."""
    return 4 * rows * words_of(vocab_size)


def words_of(vocab_size: int) -> int:
    """Words of a row's mask."""
    return -(-vocab_size // WORD_TOKENS)


class MaskBuffer:
    """Room for the masks of one step, on the host and on the device, made once (R9).

    A step's masks are written when the result of the step before has been waited for: by then the
    device has read the buffer's last content.
    """

    def __init__(self, device: Device, rows: int, vocab_size: int) -> None:
        shape = rows, words_of(vocab_size)
        buffer = device.host_buffer(shape[0] * shape[1], torch.int32).view(shape)
        self._host_MW = buffer.numpy()
        self._buffer_MW = buffer
        self._device_MW = device.upload(buffer)
        self._is_shared = self._device_MW.data_ptr() == buffer.data_ptr()
        self._to_device = device.to_device

    def send(self, step: Step, mask: Mask) -> Masks | None:
        """Starts the copy to the device; None where no row has a mask.

        Raises:
            PlanError: the masks are of other rows than those that wait for one.
        """
        rows, words = mask.row.size, self._host_MW.shape[1]
        if len(mask.bits) != 4 * rows * words:
            raise PlanError(
                f"step {mask.step} got {len(mask.bits)} bytes of masks for {rows} rows; "
                f"a row has {4 * words}"
            )
        if not rows:
            return None
        at_M = np.searchsorted(step.row_R, mask.row)
        known = (np.diff(mask.row) > 0).all() and at_M[-1] < step.row_R.size
        if not known or not ((step.row_R[at_M] == mask.row) & step.masked_R[at_M]).all():
            raise PlanError(f"step {mask.step} got masks of rows that wait for none")
        self._host_MW[:rows] = np.frombuffer(mask.bits, np.int32).reshape(rows, words)
        if not self._is_shared:
            self._device_MW[:rows].copy_(self._buffer_MW[:rows], non_blocking=True)
        return Masks(self._to_device(at_M.astype(np.int64)), self._device_MW[:rows])


def missed(step: Step, mask: Mask | None) -> np.ndarray:
    """Which of the sampled rows wait for a mask and have none."""
    if mask is None:
        return step.masked_R
    return step.masked_R & ~np.isin(step.row_R, mask.row)

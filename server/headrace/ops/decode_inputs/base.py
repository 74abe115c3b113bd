"""What a decode step's sequences need beside their slots and lengths, gathered on the device."""

# S sequences of the step · Z slots, the padding one included · W table entries · E head dim
# L positions a model may have

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class DecodeInputs(NamedTuple):
    """A row each sequence; new tensors."""

    tokens_S: Tensor  # int64, the slot's last token
    positions_S: Tensor  # int64, of that token
    cells_S: Tensor  # int64, the cell (block · P + offset) its key and value go to
    kv_len_S: Tensor  # int32, positions it attends to, its own included
    cos_sin_SE: Tensor  # float32, the row of its position


class GatherDecodeInputs(Protocol):
    """Finds them from slots and lengths, so that a captured step needs to be given no more."""

    def __call__(
        self,
        slot_S: Tensor,
        start_S: Tensor,
        last_token_Z: Tensor,
        table_ZW: Tensor,
        cos_sin_LE: Tensor,
        block_tokens: int,
    ) -> DecodeInputs:
        """
        Args:
            slot_S: int64.
            start_S: int64, cells the sequence has written: the position of its last token.
            last_token_Z: int64.
            table_ZW: int32, the block ids of every slot; contiguous rows.
            cos_sin_LE: float32, cosines and sines of every position, as `Rotary` returns them. A
                table, because the fast sine of a device is wrong at the angles of far positions.
        """
        ...

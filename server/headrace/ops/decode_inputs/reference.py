"""The inputs of a decode step in plain PyTorch."""

# S sequences of the step · Z slots, the padding one included · W table entries · E head dim
# L positions a model may have

from __future__ import annotations

import torch
from torch import Tensor

from headrace.ops.decode_inputs.base import DecodeInputs


def decode_inputs(
    slot_S: Tensor,
    start_S: Tensor,
    last_token_Z: Tensor,
    table_ZW: Tensor,
    cos_sin_LE: Tensor,
    block_tokens: int,
) -> DecodeInputs:
    """See `GatherDecodeInputs`."""
    block_S = table_ZW[slot_S, start_S // block_tokens].long()
    return DecodeInputs(
        tokens_S=last_token_Z[slot_S],
        positions_S=start_S.clone(),
        cells_S=block_S * block_tokens + start_S % block_tokens,
        kv_len_S=(start_S + 1).to(torch.int32),
        cos_sin_SE=cos_sin_LE[start_S],
    )

"""Paged attention in plain PyTorch: one row at a time, scores and sums in float32."""

# T tokens · S rows · H local query heads · K local kv heads · E head dim
# N blocks · P tokens per block · B blocks per table row · L positions of a row's context

from __future__ import annotations

import torch
from torch import Tensor

from headrace.ops.kv_write.base import UNIT, KvScales, plain
from headrace.ops.paged_attention.base import EagerOnly, StepShape


class ReferenceAttention(EagerOnly):
    """Obviously right, and slow."""

    def plan(self, shape: StepShape) -> StepShape:
        return shape

    def attend(
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        plan: StepShape,
        window: int = 0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
        softcap: float = 0.0,
    ) -> Tensor:
        """See `AttentionBackend.attend`.

        Args:
            softcap: bounds scores to ±softcap by a hyperbolic tangent; 0: they are unbounded.
        """
        o_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
        group = q_THE.shape[1] // k_cache_NPKE.shape[2]
        at = 0
        for row, (start, length) in enumerate(
            zip(plan.row_start_S.tolist(), plan.row_len_S.tolist(), strict=True)
        ):
            context = start + length
            blocks_B = plan.table_SB[row, : -(-context // plan.block_tokens)].long()
            k_LHE, v_LHE = (
                _gather(cache, blocks_B, context).mul_(scale).repeat_interleave(group, dim=1)
                for cache, scale in ((k_cache_NPKE, scales.k), (v_cache_NPKE, scales.v))
            )
            q_qHE = q_THE[at : at + length].float()
            scores_HqL = torch.einsum("qhe,lhe->hql", q_qHE, k_LHE) * q_THE.shape[2] ** -0.5
            if softcap > 0.0:
                scores_HqL = softcap * torch.tanh(scores_HqL / softcap)
            q_at = torch.arange(start, context, device=q_THE.device).unsqueeze(1)
            k_at = torch.arange(context, device=q_THE.device).unsqueeze(0)
            hidden_qL = k_at > q_at
            if window > 0:
                hidden_qL |= k_at <= q_at - window
            weights_HqL = scores_HqL.masked_fill(hidden_qL, -torch.inf).softmax(-1)
            o_THE[at : at + length] = torch.einsum("hql,lhe->qhe", weights_HqL, v_LHE)
            at += length
        return o_THE


def _gather(cache_NPKE: Tensor, blocks_B: Tensor, context: int) -> Tensor:
    """Returns the first `context` positions of a sequence as float32, [L, K, E]."""
    cells_LKE = plain(cache_NPKE)[blocks_B].flatten(0, 1)[:context]
    return cells_LKE.view(cache_NPKE.dtype).float()

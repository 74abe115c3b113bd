"""A CPU that records launches and replays them: what graphs do, for tests without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headrace.device import Graph, Staging
from headrace.device.cpu import CpuDevice
from headrace.ops.paged_attention import DecodeShape, StepShape
from headrace.ops.paged_attention.reference import ReferenceAttention


class RecordingDevice(CpuDevice):
    """Graphs are the recorded work itself, run again; columns arrive at one address."""

    graphs = True

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.recorded = 0
        self.replayed = 0

    def staging(self, size: int, stages: int) -> Staging:
        return _OneInbox(size, stages)

    def capture(self, work: Callable[[], None]) -> Graph:
        self.recorded += 1
        return _Recorded(self, work)


class _Recorded:
    def __init__(self, device: RecordingDevice, work: Callable[[], None]) -> None:
        self._device = device
        self._work = work

    def replay(self) -> None:
        self._device.replayed += 1
        self._work()


class _OneInbox:
    def __init__(self, size: int, stages: int) -> None:
        self._arrays = [np.zeros(size, np.uint8) for _ in range(stages)]
        self._inbox = torch.zeros(size, dtype=torch.uint8)

    def host(self, step: int) -> np.ndarray:
        return self._arrays[step % len(self._arrays)]

    def send(self, step: int, used: int) -> Tensor:
        self._inbox.fill_(0xA5)  # What an earlier step left must not matter.
        sent = self._inbox[:used]
        sent.copy_(torch.from_numpy(self._arrays[step % len(self._arrays)][:used]))
        return sent

    def inbox(self) -> Tensor:
        return self._inbox


class RecordedAttention(ReferenceAttention):
    """The reference, which looks at a decode step's tensors only when it attends."""

    graphs = True

    def plan_decode(self, shape: DecodeShape) -> DecodeShape:
        return shape

    def attend(
        self, q_THE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, plan: Any, *rest: Any
    ) -> Tensor:
        if isinstance(plan, DecodeShape):
            kv_len_S = plan.kv_len_S.numpy()
            plan = StepShape(
                row_start_S=kv_len_S - 1,
                row_len_S=np.ones_like(kv_len_S),
                table_SB=plan.table_ZW.index_select(0, plan.slot_S),
                block_tokens=plan.block_tokens,
            )
        return super().attend(q_THE, k_cache_NPKE, v_cache_NPKE, plan, *rest)

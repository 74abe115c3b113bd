"""A CPU that records launches and replays them: what graphs do, for tests without a GPU.

Work that is recorded whole is run again, whatever it consists of; work that is recorded in parts
is written down operation by operation, as torch dispatches them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headrace.device import Graph, Recorder, Staging
from headrace.device.cpu import CpuDevice
from headrace.ops.kv_write import UNIT, KvScales
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

    def recorder(self) -> Recorder:
        return _TapeRecorder(self)


class _TapeRecorder:
    """Writes down every operation that torch dispatches."""

    def __init__(self, device: RecordingDevice) -> None:
        self._device = device
        self._tape: _Tape | None = None

    def begin(self) -> None:
        self._tape = _Tape()
        self._tape.__enter__()

    def end(self) -> Graph:
        assert self._tape is not None, "ended before it was begun"
        tape, self._tape = self._tape, None
        tape.__exit__(None, None, None)
        self._device.recorded += 1
        return _Recorded(self._device, tape.play)


class _Tape(TorchDispatchMode):
    """Operations and the tensors they made; played, the same operations fill the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, made))
        return made

    def play(self) -> None:
        for func, args, kwargs, made in self._calls:
            before, again = tree_leaves(made), tree_leaves(func(*args, **kwargs))
            for old, new in zip(before, again, strict=True):
                # Views and tensors that were changed in place are there already.
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


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
        self,
        q_THE: Tensor,
        k_cache_NPKE: Tensor,
        v_cache_NPKE: Tensor,
        plan: Any,
        window: int = 0,
        fresh: tuple[Tensor, Tensor] | None = None,
        scales: KvScales = UNIT,
        out: Tensor | None = None,
    ) -> Tensor:
        if isinstance(plan, DecodeShape):
            kv_len_S = plan.kv_len_S.numpy()
            plan = StepShape(
                row_start_S=kv_len_S - 1,
                row_len_S=np.ones_like(kv_len_S),
                table_SB=plan.table_ZW.index_select(0, plan.slot_S),
                block_tokens=plan.block_tokens,
            )
        made = super().attend(q_THE, k_cache_NPKE, v_cache_NPKE, plan, window, fresh, scales)
        if out is None:
            return made
        return out.copy_(made.nan_to_num_(0.0, 0.0, 0.0))  # Padding rows are not written.

"""The rows of per-sequence state that plans name by slot.

Integers that decide what a step looks like (lengths, tables, features) are kept on the host, where
plans are staged; what launched work reads (last token, tables, sampling parameters, penalty
state) is on the device. On the CPU the two are the same memory.
"""

# Z slots, and one more for padding · W table entries · R chosen rows · Q penalty states · V vocab

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.device import Device
from headrace.errors import PlanError
from headrace.ops.sampling import IN_PROMPT, Edits, Feature, Knobs
from headrace.wire import Binding, Plan, Sampling

# Columns of the device's sampling parameters.
KNOBS = (
    "temperature",
    "top_p",
    "typical_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


class SlotRows:
    """Everything about running sequences that outlives a step, but for their KV cells."""

    def __init__(
        self,
        device: Device,
        *,
        slots: int,
        state_slots: int,
        table_width: int,
        blocks: int,
        vocab_size: int,
    ) -> None:
        rows = slots + 1
        self._device = device
        self._slots = slots
        self._blocks = blocks
        self._vocab_size = vocab_size
        self.padding = slots  # the slot of rows that pad a step; its table is scrap
        self._table_ZW = Mirror(device, (rows, table_width), torch.int32)
        self._knobs_ZC = Mirror(device, (rows, len(KNOBS)), torch.float32)
        self._top_k_Z = Mirror(device, (rows,), torch.int64)
        self._state_slot_Z = Mirror(device, (rows,), torch.int64)
        where = device.torch_device
        self._last_token_Z = torch.zeros(rows, dtype=torch.int64, device=where)
        self._state_QV = torch.zeros((state_slots, vocab_size), dtype=torch.int32, device=where)
        self.bound_Z = np.zeros(rows, bool)
        self.length_Z = np.zeros(rows, np.int64)  # cells written so far
        self.blocks_Z = np.zeros(rows, np.int64)  # entries of the table in use
        self._features_Z = np.zeros(rows, np.int64)
        self._seed_Z = np.zeros(rows, np.uint64)
        self._tokens_min_until_Z = np.zeros(rows, np.int64)  # first position free of the ban
        self._top_n_Z = np.zeros(rows, np.int64)
        self._edits: dict[int, Sampling] = {}  # slots with bias or ending tokens
        self._prompt_carry: dict[int, Tensor] = {}
        self._appended: Appended | None = None

    @property
    def table_ZW(self) -> np.ndarray:
        """The block tables, on the host."""
        return self._table_ZW.host

    @property
    def table(self) -> Tensor:
        """The block tables of all slots on the device: table_ZW, int32."""
        return self._table_ZW.device

    @property
    def last_token_Z(self) -> Tensor:
        """The last token of every slot, int64, on the device."""
        return self._last_token_Z

    def apply(self, plan: Plan) -> None:
        """Releases, binds and appends, in this order; raises `PlanError` at a contradiction.

        What was appended is on the device once `append_on_device` has been given it.
        """
        if plan.release_slot.size:
            self._check_slots(plan.release_slot, "releases")
            self.bound_Z[plan.release_slot] = False
            for slot in plan.release_slot.tolist():
                self._forget(slot)
        for binding in plan.bindings:
            self._bind(binding)
        if plan.append_slot.size:
            self._append(plan)
        for mirror in (self._knobs_ZC, self._top_k_Z, self._state_slot_Z):
            mirror.flush()

    def take_appended(self) -> Appended | None:
        """What was added to tables since the last call; None if the device needs no telling."""
        appended, self._appended = self._appended, None
        return None if self._table_ZW.shared else appended

    def append_on_device(self, cells: Tensor, blocks: Tensor) -> None:
        """Copies what `take_appended` returned to the device's tables."""
        self._table_ZW.device.view(-1).index_copy_(0, cells, blocks)

    def check_bound(self, step: int, slot_S: np.ndarray) -> None:
        """Raises `PlanError` unless every slot is bound."""
        self._check_slots(slot_S, "runs")
        if not self.bound_Z[slot_S].all():
            raise PlanError(f"step {step} runs a slot that is not bound")

    def tables(self, slot_R: Tensor, width: int) -> Tensor:
        """The first `width` entries of the tables of some slots, int32, on the device."""
        return self._table_ZW.device.narrow(1, 0, width).index_select(0, slot_R)

    def last_tokens(self, slot_R: Tensor) -> Tensor:
        """The last token of each slot."""
        return self._last_token_Z.index_select(0, slot_R)

    def accept(self, slot_R: Tensor, token_R: Tensor) -> None:
        """Makes drawn tokens their slots' last ones."""
        self._last_token_Z.index_copy_(0, slot_R, token_R)

    def count(self, slot_R: np.ndarray, feature_R: np.ndarray, token_R: Tensor) -> None:
        """Counts drawn tokens where penalties need it."""
        index_P = np.flatnonzero(feature_R & Feature.PENALTY)
        if index_P.size == 0:
            return
        state_P = self._state_slot_Z.host[slot_R[index_P]] * self._vocab_size
        to_device = self._device.to_device
        cell_P = to_device(state_P) + token_R.index_select(0, to_device(index_P))
        ones_P = torch.ones_like(cell_P, dtype=torch.int32)
        self._state_QV.view(-1).index_add_(0, cell_P, ones_P)

    def features(self, slot_R: np.ndarray, position_R: np.ndarray) -> np.ndarray:
        """What the sampling of each slot needs for a token at a position; Feature bits."""
        feature_R = self._features_Z[slot_R]
        over_R = position_R >= self._tokens_min_until_Z[slot_R]
        return np.where(over_R, feature_R & ~int(Feature.TOKENS_MIN), feature_R)

    def seeds(self, slot_R: np.ndarray) -> np.ndarray:
        """The seed of each slot, uint64."""
        return self._seed_Z[slot_R]

    def top_n(self, slot_R: np.ndarray) -> np.ndarray:
        """How many alternatives each slot wants."""
        return self._top_n_Z[slot_R]

    def knobs(self, slot_R: Tensor) -> Knobs:
        """The sampling parameters of some slots."""
        return knobs_of(
            self._knobs_ZC.device.index_select(0, slot_R),
            self._top_k_Z.device.index_select(0, slot_R),
        )

    def penalties(self, slot_R: Tensor) -> tuple[Tensor, Tensor]:
        """The penalty states, and which of them is each slot's."""
        return self._state_QV, self._state_slot_Z.device.index_select(0, slot_R)

    def bias(self, slot_R: np.ndarray, feature_R: np.ndarray) -> Edits | None:
        """The logit biases of some slots."""
        rows = np.flatnonzero(feature_R & Feature.BIAS).tolist()
        found = [(row, self._edits[int(slot_R[row])]) for row in rows]
        return self._flat([(row, edit.bias_token, edit.bias) for row, edit in found])

    def banned(self, slot_R: np.ndarray, feature_R: np.ndarray) -> Edits | None:
        """The tokens that may not be drawn yet."""
        rows = np.flatnonzero(feature_R & Feature.TOKENS_MIN).tolist()
        found = [(row, self._edits[int(slot_R[row])].ending_token) for row in rows]
        return self._flat([(row, ids, (-np.inf,) * len(ids)) for row, ids in found])

    def carry_logprobs(self, slot: int, logprob_V: Tensor | None) -> Tensor | None:
        """Exchanges what a prompt's chunk leaves to the next one's first token."""
        before = self._prompt_carry.pop(slot, None)
        if logprob_V is not None:
            self._prompt_carry[slot] = logprob_V.clone()
        return before

    def _bind(self, binding: Binding) -> None:
        slot, sampling = binding.slot, binding.sampling
        if slot >= self._slots:
            raise PlanError(f"slot {slot} is bound, but only {self._slots} were prepared")
        if self.bound_Z[slot]:
            raise PlanError(f"slot {slot} is bound again before it was released")
        self._forget(slot)
        self.bound_Z[slot] = True
        self.length_Z[slot] = 0
        self.blocks_Z[slot] = 0
        features = features_of(sampling)
        if features & Feature.PENALTY:
            self._remember(binding)
        if features & (Feature.BIAS | Feature.TOKENS_MIN):
            ids = sampling.bias_token + sampling.ending_token
            if not all(0 <= token < self._vocab_size for token in ids):
                raise PlanError(f"slot {slot} edits logits of tokens that do not exist")
            self._edits[slot] = sampling
        self._features_Z[slot] = int(features)
        self._seed_Z[slot] = sampling.seed
        self._tokens_min_until_Z[slot] = binding.prompt_len + sampling.tokens_min
        self._top_n_Z[slot] = sampling.top_n
        knobs = [getattr(sampling, name) for name in KNOBS]
        self._knobs_ZC.write(slot, knobs)
        self._top_k_Z.write(slot, sampling.top_k)
        self._state_slot_Z.write(slot, binding.state_slot)

    def _remember(self, binding: Binding) -> None:
        """Rebuilds a penalty state from every token so far."""
        if binding.state_slot >= len(self._state_QV):
            raise PlanError(
                f"state slot {binding.state_slot} is used, but only {len(self._state_QV)} "
                "were prepared"
            )
        history = binding.history.astype(np.int64)
        if history.size and not 0 <= history.min() <= history.max() < self._vocab_size:
            raise PlanError(f"the history of slot {binding.slot} holds tokens that do not exist")
        prompt = history[: binding.prompt_len]
        state = np.bincount(history[binding.prompt_len :], minlength=self._vocab_size)
        state[prompt] |= IN_PROMPT
        self._state_QV[binding.state_slot].copy_(self._device.to_device(state.astype(np.int32)))

    def _append(self, plan: Plan) -> None:
        slot_A, length_A = plan.append_slot.astype(np.int64), plan.append_len
        self._check_slots(slot_A, "appends to")
        width = self._table_ZW.host.shape[1]
        if (length_A < 0).any() or int(length_A.sum()) != plan.append_block.size:
            raise PlanError(f"step {plan.step}: the appended blocks do not add up")
        if not self.bound_Z[slot_A].all():
            raise PlanError(f"step {plan.step} appends blocks to a slot that is not bound")
        for slot, at, length in zip(
            slot_A.tolist(), plan.append_at.tolist(), length_A.tolist(), strict=True
        ):
            if at != self.blocks_Z[slot] or at + length > width:
                raise PlanError(
                    f"step {plan.step} appends {length} blocks at {at} to the table of slot "
                    f"{slot}, which has {self.blocks_Z[slot]} of {width}"
                )
            self.blocks_Z[slot] += length
        block_B = plan.append_block
        if block_B.size and not 1 <= block_B.min() <= block_B.max() < self._blocks:
            raise PlanError(f"step {plan.step} appends a block outside the pool")
        first_A = np.cumsum(length_A) - length_A
        cell_B = np.repeat(slot_A * width + plan.append_at - first_A, length_A)
        cell_B += np.arange(block_B.size)
        self._table_ZW.host.reshape(-1)[cell_B] = block_B
        self._appended = Appended(cell_B, block_B)

    def _check_slots(self, slot_A: np.ndarray, verb: str) -> None:
        if not 0 <= slot_A.min() <= slot_A.max() < self._slots:
            raise PlanError(f"a plan {verb} a slot outside the {self._slots} that were prepared")

    def _forget(self, slot: int) -> None:
        self._edits.pop(slot, None)
        self._prompt_carry.pop(slot, None)

    def _flat(self, edits: list[tuple[int, tuple[int, ...], tuple[float, ...]]]) -> Edits | None:
        if not edits:
            return None
        row = np.repeat([row for row, _, _ in edits], [len(ids) for _, ids, _ in edits])
        token = [token for _, ids, _ in edits for token in ids]
        value = [value for _, _, values in edits for value in values]
        to_device = self._device.to_device
        return Edits(
            to_device(row.astype(np.int64)),
            to_device(np.array(token, np.int64)),
            to_device(np.array(value, np.float32)),
        )


@dataclass(frozen=True)
class Appended:
    """Entries that were added to tables."""

    cells: np.ndarray  # int64: indices in the flat table
    blocks: np.ndarray  # int32


class Mirror:
    """A host array that the device has a copy of; one and the same memory on the CPU."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        buffer = device.host_buffer(int(np.prod(shape)), dtype).view(shape)
        self.host = buffer.numpy()
        self.device = device.upload(buffer)
        self.shared = self.device.data_ptr() == buffer.data_ptr()
        self._to_device = device.to_device
        self._written: set[int] = set()

    def write(self, row: int, value: list[float] | int) -> None:
        """Writes one row; the device has it after the next `flush`."""
        self.host[row] = value
        if not self.shared:
            self._written.add(row)

    def flush(self) -> None:
        """Starts to copy what was written, all rows at once."""
        if self._written:
            rows = np.array(sorted(self._written), np.int64)
            self._written.clear()
            self.device.index_copy_(0, self._to_device(rows), self._to_device(self.host[rows]))


def knobs_of(table_SC: Tensor, top_k_S: Tensor) -> Knobs:
    """The columns of a table whose columns are `KNOBS`."""
    column = dict(zip(KNOBS, table_SC.unbind(1), strict=True))
    return Knobs(
        temperature_S=column["temperature"],
        top_k_S=top_k_S,
        top_p_S=column["top_p"],
        typical_p_S=column["typical_p"],
        min_p_S=column["min_p"],
        repetition_S=column["repetition_penalty"],
        frequency_S=column["frequency_penalty"],
        presence_S=column["presence_penalty"],
    )


def features_of(sampling: Sampling) -> Feature:
    """What a sequence's sampling needs."""
    features = Feature(0)
    if sampling.temperature > 0:
        features |= Feature.SAMPLED
        if sampling.top_k > 0 or sampling.top_p < 1:
            features |= Feature.FILTERED
        if sampling.typical_p < 1:
            features |= Feature.TYPICAL
        if sampling.min_p > 0:
            features |= Feature.MIN_P
    if sampling.watermark:
        features |= Feature.WATERMARK
    if sampling.needs_history():
        features |= Feature.PENALTY
    if sampling.bias_token:
        features |= Feature.BIAS
    if sampling.tokens_min > 0 and sampling.ending_token:
        features |= Feature.TOKENS_MIN
    if sampling.logprob_raw:
        features |= Feature.LOGPROB_RAW
    if sampling.top_n > 0:
        features |= Feature.TOP_N
    return features

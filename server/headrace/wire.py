"""The contract's bytes: plans come in as numpy views over them, results go out as them.

The message classes are built at run time from the descriptor set that the Rust build writes,
because generated Python that is newer than the installed protobuf fails at import.
"""

# S rows of the plan · T query tokens of the step

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from importlib import resources
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from headrace.errors import ConfigError, PlanError

SERVICE = "headrace.v1.Shard"
TRACE_CONTEXT_BYTES = 25

I32 = np.dtype("<i4")
F32 = np.dtype("<f4")


class RowFlag(IntFlag):
    """Bits of `StepPlan.row_flags`."""

    SAMPLE = 1
    FROM_SLOT = 2
    START_AT_LENGTH = 4
    MASKED = 8
    PROMPT_LOGPROBS = 16


class ResultFlag(IntFlag):
    """Bits of `StepResult.row_flags`."""

    NAN = 1
    MASK_MISSED = 2


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one sequence are drawn; the neutral values are the contract's."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    top_n: int = 0
    logprob_raw: bool = False
    watermark: bool = False
    tokens_min: int = 0
    ending_token: tuple[int, ...] = ()
    bias_token: tuple[int, ...] = ()
    bias: tuple[float, ...] = ()

    def needs_history(self) -> bool:
        """Whether every token so far matters to the next one."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class Binding:
    """A slot given to a sequence before the step runs."""

    slot: int
    generation: int
    sampling: Sampling
    history: np.ndarray  # int32, every token so far when the sampling has penalties
    prompt_len: int
    state_slot: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One device step. Columns are read-only int32 views over the received bytes."""

    step: int
    data: bytes  # the whole message, for the digest
    release_slot: np.ndarray
    bindings: Sequence[Binding]
    zero_block: np.ndarray
    append_slot: np.ndarray
    append_at: np.ndarray
    append_len: np.ndarray
    append_block: np.ndarray
    row_slot_S: np.ndarray
    row_start_S: np.ndarray
    row_len_S: np.ndarray
    row_flags_S: np.ndarray
    token_id: np.ndarray  # of the rows that do not take their slot's last token
    trace_row: np.ndarray
    trace_context: bytes


@dataclass(frozen=True, slots=True)
class Mask:
    """Which tokens the constrained rows of a step may draw."""

    step: int
    row: np.ndarray
    bits: bytes


@dataclass(slots=True)
class Result:
    """What came out of a step; columns as in `StepResult`, one entry a sampled row."""

    step: int
    row_index: np.ndarray  # int32
    token_id: np.ndarray  # int32
    row_flags: np.ndarray  # int32
    logprob: np.ndarray  # float32
    top_count: np.ndarray  # int32
    top_token_id: np.ndarray  # int32, flat
    top_logprob: np.ndarray  # float32, flat
    prompt_logprob: np.ndarray  # float32, flat
    prompt_best_token: np.ndarray  # int32, flat
    prompt_best_logprob: np.ndarray  # float32, flat
    device_time_us: int = 0
    digest: int = 0


@functools.cache
def messages() -> Any:
    """The message classes of `headrace.v1`, by name."""
    try:
        data = resources.files("headrace").joinpath("_native/shard.binpb").read_bytes()
    except OSError as error:
        raise ConfigError(
            "headrace/_native/shard.binpb is missing: build the project first (make install)"
        ) from error
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.AddSerializedFile(file.SerializeToString())
    service = pool.FindServiceByName(SERVICE)
    names = service.file.message_types_by_name
    classes = {name: message_factory.GetMessageClass(names[name]) for name in names}
    return type("Messages", (), classes)


def decode(data: bytes) -> Plan | Mask:
    """Reads a `ToShard` message; raises `PlanError` when it contradicts itself."""
    try:
        message = messages().ToShard.FromString(data)
    except DecodeError as error:
        raise PlanError(f"{len(data)} bytes are not a ToShard message") from error
    kind = message.WhichOneof("message")
    try:
        if kind == "plan":
            return _plan(message.plan, data)
        if kind == "mask":
            mask = message.mask
            return Mask(mask.step, np.frombuffer(mask.row_i32le, I32), mask.bits)
    except ValueError as error:  # np.frombuffer: not a whole number of entries
        raise PlanError(f"a column of the {kind} is torn: {error}") from error
    raise PlanError("a ToShard message holds neither a plan nor a mask")


def _plan(plan: Any, data: bytes) -> Plan:
    view = np.frombuffer
    made = Plan(
        step=plan.step,
        data=data,
        release_slot=view(plan.release_slot_i32le, I32),
        bindings=[_binding(binding) for binding in plan.bindings],
        zero_block=view(plan.zero_block_i32le, I32),
        append_slot=view(plan.append_slot_i32le, I32),
        append_at=view(plan.append_at_i32le, I32),
        append_len=view(plan.append_len_i32le, I32),
        append_block=view(plan.append_block_i32le, I32),
        row_slot_S=view(plan.row_slot_i32le, I32),
        row_start_S=view(plan.row_start_i32le, I32),
        row_len_S=view(plan.row_len_i32le, I32),
        row_flags_S=view(plan.row_flags_i32le, I32),
        token_id=view(plan.token_id_i32le, I32),
        trace_row=view(plan.trace_row_i32le, I32),
        trace_context=plan.trace_context,
    )
    rows = made.row_slot_S.size
    if not made.row_start_S.size == made.row_len_S.size == made.row_flags_S.size == rows:
        raise PlanError(f"step {made.step}: the row columns have different lengths")
    if not made.append_slot.size == made.append_at.size == made.append_len.size:
        raise PlanError(f"step {made.step}: the append columns have different lengths")
    if len(made.trace_context) != TRACE_CONTEXT_BYTES * made.trace_row.size:
        raise PlanError(f"step {made.step}: the trace columns have different lengths")
    return made


def _binding(binding: Any) -> Binding:
    sampling = binding.sampling
    return Binding(
        slot=binding.slot,
        generation=binding.generation,
        sampling=Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            typical_p=sampling.typical_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            seed=sampling.seed,
            top_n=sampling.top_n,
            logprob_raw=sampling.logprob_raw,
            watermark=sampling.watermark,
            tokens_min=sampling.tokens_min,
            ending_token=tuple(np.frombuffer(sampling.ending_token_i32le, I32).tolist()),
            bias_token=tuple(np.frombuffer(sampling.bias_token_i32le, I32).tolist()),
            bias=tuple(np.frombuffer(sampling.bias_f32le, F32).tolist()),
        ),
        history=np.frombuffer(binding.history_token_i32le, I32),
        prompt_len=binding.prompt_len,
        state_slot=binding.state_slot,
    )


def encode_result(result: Result) -> bytes:
    """The bytes of a `StepResult`."""
    message = messages().StepResult(
        step=result.step,
        row_index_i32le=_bytes(result.row_index, I32),
        token_id_i32le=_bytes(result.token_id, I32),
        row_flags_i32le=_bytes(result.row_flags, I32),
        logprob_f32le=_bytes(result.logprob, F32),
        top_count_i32le=_bytes(result.top_count, I32),
        top_token_id_i32le=_bytes(result.top_token_id, I32),
        top_logprob_f32le=_bytes(result.top_logprob, F32),
        prompt_logprob_f32le=_bytes(result.prompt_logprob, F32),
        prompt_best_token_i32le=_bytes(result.prompt_best_token, I32),
        prompt_best_logprob_f32le=_bytes(result.prompt_best_logprob, F32),
        device_time_us=result.device_time_us,
        digest=result.digest,
    )
    return message.SerializeToString()


def decode_result(data: bytes) -> Result:
    """Reads a `StepResult`, for replay and tests."""
    try:
        message = messages().StepResult.FromString(data)
    except DecodeError as error:
        raise PlanError(f"{len(data)} bytes are not a StepResult message") from error
    view = np.frombuffer
    return Result(
        step=message.step,
        row_index=view(message.row_index_i32le, I32),
        token_id=view(message.token_id_i32le, I32),
        row_flags=view(message.row_flags_i32le, I32),
        logprob=view(message.logprob_f32le, F32),
        top_count=view(message.top_count_i32le, I32),
        top_token_id=view(message.top_token_id_i32le, I32),
        top_logprob=view(message.top_logprob_f32le, F32),
        prompt_logprob=view(message.prompt_logprob_f32le, F32),
        prompt_best_token=view(message.prompt_best_token_i32le, I32),
        prompt_best_logprob=view(message.prompt_best_logprob_f32le, F32),
        device_time_us=message.device_time_us,
        digest=message.digest,
    )


def encode_plan(plan: Plan) -> bytes:
    """The bytes of a `ToShard` message with a plan, for tests."""
    kinds = messages()
    message = kinds.StepPlan(
        step=plan.step,
        release_slot_i32le=_bytes(plan.release_slot, I32),
        bindings=[_binding_message(kinds, binding) for binding in plan.bindings],
        zero_block_i32le=_bytes(plan.zero_block, I32),
        append_slot_i32le=_bytes(plan.append_slot, I32),
        append_at_i32le=_bytes(plan.append_at, I32),
        append_len_i32le=_bytes(plan.append_len, I32),
        append_block_i32le=_bytes(plan.append_block, I32),
        row_slot_i32le=_bytes(plan.row_slot_S, I32),
        row_start_i32le=_bytes(plan.row_start_S, I32),
        row_len_i32le=_bytes(plan.row_len_S, I32),
        row_flags_i32le=_bytes(plan.row_flags_S, I32),
        token_id_i32le=_bytes(plan.token_id, I32),
        trace_row_i32le=_bytes(plan.trace_row, I32),
        trace_context=plan.trace_context,
    )
    return kinds.ToShard(plan=message).SerializeToString()


def _binding_message(kinds: Any, binding: Binding) -> Any:
    sampling = binding.sampling
    return kinds.SlotBinding(
        slot=binding.slot,
        generation=binding.generation,
        sampling=kinds.Sampling(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            typical_p=sampling.typical_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            seed=sampling.seed,
            top_n=sampling.top_n,
            logprob_raw=sampling.logprob_raw,
            watermark=sampling.watermark,
            tokens_min=sampling.tokens_min,
            ending_token_i32le=_bytes(np.array(sampling.ending_token), I32),
            bias_token_i32le=_bytes(np.array(sampling.bias_token), I32),
            bias_f32le=_bytes(np.array(sampling.bias), F32),
        ),
        history_token_i32le=_bytes(binding.history, I32),
        prompt_len=binding.prompt_len,
        state_slot=binding.state_slot,
    )


def _bytes(column: np.ndarray, dtype: np.dtype) -> bytes:
    return column.astype(dtype, copy=False).tobytes()

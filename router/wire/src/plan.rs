//! `StepPlan` to a `ToShard` message and back. Encoding is by hand: the columns go to the buffer
//! in one pass and nothing is built in between.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use headrace_core::ids::{Generation, SlotId, StateSlot, StepId, TokenId, Tokens};
use headrace_core::plan::{SlotBinding, StepPlan, row_flag};
use headrace_core::request::{Sampling, TraceContext};
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len, message};

use crate::column::{
    delimited_len, expect_entries, field_len, pack_f32, pack_i32, put_field, total, unpack_f32,
    unpack_i32,
};
use crate::{WireError, pb};

/// Field numbers of `ToShard` and of those parts of `StepPlan` that are no plain columns.
mod tag {
    pub(super) const PLAN: u32 = 1;
    pub(super) const STEP: u32 = 1;
    pub(super) const BINDINGS: u32 = 3;
    pub(super) const TRACE_CONTEXT: u32 = 15;
}

/// A column and its field number.
type Column<'a> = (u32, &'a [i32]);

/// The columns before and after the bindings.
fn columns(plan: &StepPlan) -> ([Column<'_>; 1], [Column<'_>; 11]) {
    (
        [(2, &plan.release_slot)],
        [
            (4, &plan.zero_block),
            (5, &plan.append_slot),
            (6, &plan.append_at),
            (7, &plan.append_len),
            (8, &plan.append_block),
            (9, &plan.row_slot),
            (10, &plan.row_start),
            (11, &plan.row_len),
            (12, &plan.row_flags),
            (13, &plan.token_id),
            (14, &plan.trace_row),
        ],
    )
}

/// Encodes a plan as the `ToShard` message that every rank receives. `buffer` is scratch: its
/// allocation is used again once all earlier messages made from it are gone.
pub fn encode_plan(plan: &StepPlan, buffer: &mut BytesMut) -> Bytes {
    let bindings: Vec<_> = plan.bindings.iter().map(binding_message).collect();
    let (before, after) = columns(plan);
    let trace = plan.trace_context.as_flattened();

    let mut len = delimited_len(tag::TRACE_CONTEXT, trace.len());
    if plan.step.0 != 0 {
        len += key_len(tag::STEP) + encoded_len_varint(plan.step.0);
    }
    len += before
        .iter()
        .chain(&after)
        .map(|(tag, column)| field_len(*tag, column))
        .sum::<usize>();
    len += message::encoded_len_repeated(tag::BINDINGS, &bindings);

    buffer.clear();
    buffer.reserve(len + key_len(tag::PLAN) + encoded_len_varint(len as u64));
    encode_key(tag::PLAN, WireType::LengthDelimited, buffer);
    encode_varint(len as u64, buffer);
    let body = buffer.len();
    if plan.step.0 != 0 {
        prost::encoding::uint64::encode(tag::STEP, &plan.step.0, buffer);
    }
    for (tag, column) in before {
        put_field(tag, column, buffer);
    }
    message::encode_repeated(tag::BINDINGS, &bindings, buffer);
    for (tag, column) in after {
        put_field(tag, column, buffer);
    }
    if !trace.is_empty() {
        encode_key(tag::TRACE_CONTEXT, WireType::LengthDelimited, buffer);
        encode_varint(trace.len() as u64, buffer);
        buffer.put_slice(trace);
    }
    debug_assert_eq!(
        buffer.len() - body,
        len,
        "the announced length is the written one"
    );
    buffer.split().freeze()
}

/// Decodes what [`encode_plan`] wrote, and checks that its columns agree with each other.
pub fn decode_plan(message: impl Buf) -> Result<StepPlan, WireError> {
    let Some(pb::to_shard::Message::Plan(plan)) = pb::ToShard::decode(message)?.message else {
        return Err(WireError::NoPlan);
    };
    let bindings = plan
        .bindings
        .into_iter()
        .map(binding_value)
        .collect::<Result<_, _>>()?;
    let (contexts, rest) = plan.trace_context.as_chunks();
    if !rest.is_empty() {
        return Err(WireError::Ragged {
            column: "trace_context",
            bytes: plan.trace_context.len(),
            element: size_of::<TraceContext>(),
        });
    }
    let plan = StepPlan {
        step: StepId(plan.step),
        release_slot: unpack_i32("release_slot", &plan.release_slot_i32le)?,
        bindings,
        zero_block: unpack_i32("zero_block", &plan.zero_block_i32le)?,
        append_slot: unpack_i32("append_slot", &plan.append_slot_i32le)?,
        append_at: unpack_i32("append_at", &plan.append_at_i32le)?,
        append_len: unpack_i32("append_len", &plan.append_len_i32le)?,
        append_block: unpack_i32("append_block", &plan.append_block_i32le)?,
        row_slot: unpack_i32("row_slot", &plan.row_slot_i32le)?,
        row_start: unpack_i32("row_start", &plan.row_start_i32le)?,
        row_len: unpack_i32("row_len", &plan.row_len_i32le)?,
        row_flags: unpack_i32("row_flags", &plan.row_flags_i32le)?,
        token_id: unpack_i32("token_id", &plan.token_id_i32le)?,
        trace_row: unpack_i32("trace_row", &plan.trace_row_i32le)?,
        trace_context: contexts.to_vec(),
    };
    check(&plan)?;
    Ok(plan)
}

fn check(plan: &StepPlan) -> Result<(), WireError> {
    let appends = plan.append_slot.len();
    expect_entries("append_at", plan.append_at.len(), appends)?;
    expect_entries("append_len", plan.append_len.len(), appends)?;
    let blocks = total("append_len", &plan.append_len)?;
    expect_entries("append_block", plan.append_block.len(), blocks)?;
    let rows = plan.rows();
    expect_entries("row_start", plan.row_start.len(), rows)?;
    expect_entries("row_len", plan.row_len.len(), rows)?;
    expect_entries("row_flags", plan.row_flags.len(), rows)?;
    total("row_len", &plan.row_len)?;
    let from_host: Vec<i32> = std::iter::zip(&plan.row_len, &plan.row_flags)
        .filter(|(_, flags)| **flags & row_flag::FROM_SLOT == 0)
        .map(|(len, _)| *len)
        .collect();
    expect_entries(
        "token_id",
        plan.token_id.len(),
        total("row_len", &from_host)?,
    )?;
    expect_entries(
        "trace_context",
        plan.trace_context.len(),
        plan.trace_row.len(),
    )
}

fn binding_message(binding: &SlotBinding) -> pb::SlotBinding {
    let sampling = &binding.sampling;
    pb::SlotBinding {
        slot: binding.slot.0,
        generation: binding.generation.0,
        sampling: Some(pb::Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            typical_p: sampling.typical_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            seed: sampling.seed,
            top_n: sampling.top_n,
            logprob_raw: sampling.logprob_raw,
            watermark: sampling.watermark,
            tokens_min: sampling.tokens_min.0,
            ending_token_i32le: pack_ids(&binding.ending),
            bias_token_i32le: pack_i32(sampling.bias.iter().map(|(id, _)| id.0.cast_signed())),
            bias_f32le: pack_f32(sampling.bias.iter().map(|(_, bias)| *bias)),
        }),
        history_token_i32le: pack_ids(&binding.history),
        prompt_len: binding.prompt_len.0,
        state_slot: binding.state_slot.0,
    }
}

fn binding_value(binding: pb::SlotBinding) -> Result<SlotBinding, WireError> {
    let sampling = binding
        .sampling
        .ok_or(WireError::NoSampling { slot: binding.slot })?;
    let bias_tokens = unpack_ids("bias_token", &sampling.bias_token_i32le)?;
    let bias = unpack_f32("bias", &sampling.bias_f32le)?;
    expect_entries("bias", bias.len(), bias_tokens.len())?;
    Ok(SlotBinding {
        slot: SlotId(binding.slot),
        generation: Generation(binding.generation),
        ending: unpack_ids("ending_token", &sampling.ending_token_i32le)?.into(),
        sampling: Arc::new(Sampling {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            typical_p: sampling.typical_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            seed: sampling.seed,
            top_n: sampling.top_n,
            logprob_raw: sampling.logprob_raw,
            watermark: sampling.watermark,
            tokens_min: Tokens(sampling.tokens_min),
            bias: bias_tokens.into_iter().zip(bias).collect(),
        }),
        history: unpack_ids("history_token", &binding.history_token_i32le)?,
        prompt_len: Tokens(binding.prompt_len),
        state_slot: StateSlot(binding.state_slot),
    })
}

fn pack_ids(ids: &[TokenId]) -> Bytes {
    pack_i32(ids.iter().map(|id| id.0.cast_signed()))
}

fn unpack_ids(column: &'static str, packed: &[u8]) -> Result<Vec<TokenId>, WireError> {
    let ids = unpack_i32(column, packed)?;
    Ok(ids
        .into_iter()
        .map(|id| TokenId(id.cast_unsigned()))
        .collect())
}

#[cfg(test)]
mod tests;

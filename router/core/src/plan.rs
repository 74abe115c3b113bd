//! A plan: one device step as a value, in columns. It says everything; the shards decide nothing.

use std::sync::Arc;

use crate::ids::{BlockId, Generation, SlotId, StateSlot, StepId, TokenId, Tokens};
use crate::request::{Sampling, TraceContext};

/// Bits of [`StepPlan::row_flags`], as on the wire.
pub mod row_flag {
    /// Sample after this row.
    pub const SAMPLE: i32 = 1;
    /// The input is the slot's last token, on the device.
    pub const FROM_SLOT: i32 = 1 << 1;
    /// The start is the slot's length on the device.
    pub const START_AT_LENGTH: i32 = 1 << 2;
    /// The sampler waits for a mask (R7).
    pub const MASKED: i32 = 1 << 3;
    /// Log-probabilities of the row's own tokens are wanted.
    pub const PROMPT_LOGPROBS: i32 = 1 << 4;
}

/// A slot bound to a sequence before the step runs; its table starts empty.
#[derive(Debug, Clone, PartialEq)]
pub struct SlotBinding {
    /// The slot.
    pub slot: SlotId,
    /// Which binding of this slot it is.
    pub generation: Generation,
    /// How its tokens are drawn.
    pub sampling: Arc<Sampling>,
    /// Ids that end the sequence (for `tokens_min`).
    pub ending: Arc<[TokenId]>,
    /// Every token so far, when the sampling needs history; empty otherwise.
    pub history: Vec<TokenId>,
    /// Prompt tokens.
    pub prompt_len: Tokens,
    /// Side-pool entry, when the sampling needs history.
    pub state_slot: StateSlot,
}

/// One device step. Entry `i` of every `row_*` column describes row `i`. Columns are the wire's
/// `int32`, because they are copied there as they stand.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepPlan {
    /// The step's number.
    pub step: StepId,
    /// Slots whose sequence has ended or lost its blocks.
    pub release_slot: Vec<i32>,
    /// Slots bound before the step runs.
    pub bindings: Vec<SlotBinding>,
    /// Blocks to zero before they are written.
    pub zero_block: Vec<i32>,
    /// Table appends: the slot,
    pub append_slot: Vec<i32>,
    /// the table index of the first block,
    pub append_at: Vec<i32>,
    /// and how many blocks.
    pub append_len: Vec<i32>,
    /// The blocks, flat.
    pub append_block: Vec<i32>,
    /// The row's slot.
    pub row_slot: Vec<i32>,
    /// Position of the row's first query token.
    pub row_start: Vec<i32>,
    /// Query tokens of the row.
    pub row_len: Vec<i32>,
    /// [`row_flag`] bits.
    pub row_flags: Vec<i32>,
    /// Ids of the rows without `FROM_SLOT`, flat.
    pub token_id: Vec<i32>,
    /// Rows that carry a trace context.
    pub trace_row: Vec<i32>,
    /// The contexts, one per `trace_row`.
    pub trace_context: Vec<TraceContext>,
}

impl StepPlan {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.row_slot.len()
    }

    /// Empties every column and keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.release_slot.clear();
        self.bindings.clear();
        self.zero_block.clear();
        self.append_slot.clear();
        self.append_at.clear();
        self.append_len.clear();
        self.append_block.clear();
        self.row_slot.clear();
        self.row_start.clear();
        self.row_len.clear();
        self.row_flags.clear();
        self.token_id.clear();
        self.trace_row.clear();
        self.trace_context.clear();
    }

    /// Appends `blocks` to the table of `slot`, the first at index `at`.
    pub(crate) fn append(&mut self, slot: SlotId, at: usize, blocks: &[BlockId]) {
        if blocks.is_empty() {
            return;
        }
        let column = |n: usize| i32::try_from(n).expect("a table is shorter than the pool");
        self.append_slot.push(slot.0.cast_signed());
        self.append_at.push(column(at));
        self.append_len.push(column(blocks.len()));
        self.append_block
            .extend(blocks.iter().map(|block| block.0.cast_signed()));
    }

    /// Adds a row; `tokens` are the ids that it carries, none for a row that reads its slot.
    pub(crate) fn row(&mut self, row: Row, tokens: &[TokenId], trace: Option<TraceContext>) {
        if let Some(context) = trace {
            let at = i32::try_from(self.rows()).expect("a step has fewer rows than tokens");
            self.trace_row.push(at);
            self.trace_context.push(context);
        }
        self.row_slot.push(row.slot.0.cast_signed());
        self.row_start.push(row.start.0.cast_signed());
        self.row_len.push(row.len.0.cast_signed());
        self.row_flags.push(row.flags);
        self.token_id
            .extend(tokens.iter().map(|token| token.0.cast_signed()));
    }
}

/// One entry of the `row_*` columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub(crate) slot: SlotId,
    pub(crate) start: Tokens,
    pub(crate) len: Tokens,
    pub(crate) flags: i32,
}

/// Bits of [`StepResult::row_flags`], as on the wire.
pub mod result_flag {
    /// A NaN was seen and sanitized (R10).
    pub const NAN: i32 = 1;
    /// The row's mask was missed (R7).
    pub const MASK_MISSED: i32 = 1 << 1;
}

/// What came out of a step: one entry a sampled row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepResult {
    /// The step's number.
    pub step: StepId,
    /// Rows that were sampled, ascending.
    pub row_index: Vec<i32>,
    /// Their tokens.
    pub token_id: Vec<i32>,
    /// [`result_flag`] bits.
    pub row_flags: Vec<i32>,
    /// Log-probability of each token.
    pub logprob: Vec<f32>,
    /// Alternatives per row.
    pub top_count: Vec<i32>,
    /// Alternatives, flat.
    pub top_token_id: Vec<i32>,
    /// Their log-probabilities, flat.
    pub top_logprob: Vec<f32>,
    /// Log-probabilities of prompt tokens, flat over rows that wanted them, `row_len` each.
    pub prompt_logprob: Vec<f32>,
    /// The most probable token in the place of each of them.
    pub prompt_best_token: Vec<i32>,
    /// Its log-probability.
    pub prompt_best_logprob: Vec<f32>,
    /// Time the device spent, microseconds.
    pub device_time_us: u32,
    /// Of the plan's bytes, slot lengths and NaN flags; equal on every rank.
    pub digest: u64,
}

//! A decided row becomes columns of the plan.

use crate::ids::{SeqId, StepId, TokenId, Tokens};
use crate::kv::Adopter;
use crate::mutation::Mutation;
use crate::plan::{Row, StepPlan, row_flag};
use crate::scheduler::{Draft, PlannedRow, PlannedStep, Scheduler};
use crate::sequence::{Phase, SeqState, Sequence};

// === impl Scheduler ===

impl Scheduler {
    /// Writes a decided row into the plan: growth, table, tokens, adoption.
    pub(super) fn emit(&mut self, draft: Draft, plan: &mut StepPlan, step: &mut PlannedStep) {
        let sequence = &self.sequences[draft.seq];
        let late = self.seeded.is(Mutation::ChunkStartsLate) && draft.len > Tokens(1);
        let planned = sequence.running().planned;
        let start = Tokens(planned.0 + u32::from(late));
        let end = Tokens(planned.0 + draft.len.0);
        let len = Tokens(end.0 - start.0);
        let flags = self.flags(sequence, draft.phase, start, end);

        let binding = self.sequences[draft.seq].running_mut();
        let slot = binding.slot;
        self.kv.grow(&mut binding.table, draft.growth, plan);
        let (at, blocks) = binding.table.take_unsent();
        plan.append(slot, at, blocks);
        let tail = self.limits.block_size.floor(Tokens(end.0 - 1)).0 as usize;
        let tail = binding.table.blocks().get(tail);
        let planned = PlannedRow {
            slot,
            generation: binding.generation,
            end,
            len,
            sampled: flags & row_flag::SAMPLE != 0,
            masked: flags & row_flag::MASKED != 0,
            logprobs: flags & row_flag::PROMPT_LOGPROBS != 0,
            tail: *tail.expect("growth was settled for the row's last cell; this is a router bug"),
        };
        binding.planned = end;
        binding.in_flight += u32::from(planned.sampled);
        step.rows.push(planned);
        self.slots.name(slot, plan.step);

        let sequence = &self.sequences[draft.seq];
        let row = Row {
            slot,
            start,
            len,
            flags,
        };
        let trace = sequence.request.trace;
        match draft.phase {
            Phase::Decode => plan.row(row, &[], trace),
            Phase::Prefill => {
                plan.row(
                    row,
                    &sequence.tokens[start.0 as usize..end.0 as usize],
                    trace,
                );
                self.stats.prefill_tokens += u64::from(len.0);
                self.prefilled(draft.seq, end, plan.step);
            }
        }
    }

    /// The flags of a row: it samples when no known token is left behind it.
    fn flags(&self, sequence: &Sequence, phase: Phase, start: Tokens, end: Tokens) -> i32 {
        let last = end >= sequence.len() || self.seeded.is(Mutation::ChunkSamplesEarly);
        let logprobs = sequence.owes_logprobs() && start < sequence.prompt_len();
        let unwanted = phase == Phase::Prefill && self.seeded.is(Mutation::MaskNotWanted);
        let masked = sequence.request.masked && !unwanted;
        let mut flags = 0;
        for (flag, set) in [
            (row_flag::SAMPLE, last),
            (row_flag::FROM_SLOT, phase == Phase::Decode),
            (row_flag::MASKED, last && masked),
            (row_flag::PROMPT_LOGPROBS, logprobs),
        ] {
            flags |= if set { flag } else { 0 };
        }
        flags
    }

    /// A chunk of known tokens is planned up to `end`: its full blocks are shared from now on (R5).
    fn prefilled(&mut self, seq: SeqId, end: Tokens, step: StepId) {
        let sequence = &mut self.sequences[seq];
        let tokens: &[TokenId] = &sequence.tokens[..end.0 as usize];
        let by = Adopter {
            seq,
            step,
            proven: Tokens(0),
        };
        let SeqState::Prefilling(binding) = &mut sequence.state else {
            panic!("only a prefilling sequence has prompt chunks; this is a router bug");
        };
        self.kv.adopt(&mut binding.table, tokens, by);
        if end == sequence.len() {
            sequence.prefilled();
            if self.recovering == Some(seq) {
                self.recovering = None;
            }
        }
    }
}

//! A decided row becomes columns of the plan.

use crate::ids::{SeqId, StepId, TokenId, Tokens};
use crate::kv::Adopter;
use crate::mutation::Mutation;
use crate::plan::{Row, StepPlan, row_flag};
use crate::scheduler::{Draft, PlannedRow, PlannedStep, Scheduler};
use crate::sequence::{Phase, SeqState};

// === impl Scheduler ===

impl Scheduler {
    /// Writes a decided row into the plan: growth, table, tokens, adoption.
    pub(super) fn emit(&mut self, draft: Draft, plan: &mut StepPlan, step: &mut PlannedStep) {
        let sequence = self
            .sequences
            .get_mut(&draft.seq)
            .expect("a drafted sequence is known");
        let (owes_logprobs, known) = (sequence.owes_logprobs(), sequence.len());
        let (prompt_len, trace) = (sequence.prompt_len(), sequence.request.trace);
        let binding = sequence.running_mut();
        let late = self.seeded.is(Mutation::ChunkStartsLate)
            && draft.phase == Phase::Prefill
            && draft.len > Tokens(1);
        let draft = Draft {
            len: Tokens(draft.len.0 - u32::from(late)),
            ..draft
        };
        let (slot, start) = (binding.slot, Tokens(binding.planned.0 + u32::from(late)));
        let end = Tokens(start.0 + draft.len.0);
        self.kv.grow(&mut binding.table, draft.growth, plan);
        let (at, blocks) = binding.table.take_unsent();
        plan.append(slot, at, blocks);

        let sampled = end.0 >= known.0;
        let logprobs = owes_logprobs && start < prompt_len;
        let early = self.seeded.is(Mutation::ChunkSamplesEarly);
        let mut flags = if sampled || early {
            row_flag::SAMPLE
        } else {
            0
        };
        binding.planned = end;
        binding.in_flight += u32::from(sampled);
        let tail_at = self.limits.block_size.floor(Tokens(end.0 - 1)).0 as usize;
        let tail = binding.table.blocks().get(tail_at);
        step.rows.push(PlannedRow {
            slot,
            generation: binding.generation,
            end,
            len: draft.len,
            sampled,
            logprobs,
            tail: *tail.expect("growth was settled for the row's last cell; this is a router bug"),
        });
        self.slots.name(slot, plan.step);
        let row = Row {
            slot,
            start,
            len: draft.len,
            flags,
        };
        match draft.phase {
            Phase::Decode => {
                flags |= row_flag::FROM_SLOT;
                plan.row(Row { flags, ..row }, &[], trace);
            }
            Phase::Prefill => {
                flags |= if logprobs {
                    row_flag::PROMPT_LOGPROBS
                } else {
                    0
                };
                let tokens = &sequence.tokens[start.0 as usize..end.0 as usize];
                plan.row(Row { flags, ..row }, tokens, trace);
                self.stats.prefill_tokens += u64::from(draft.len.0);
                self.prefilled(draft.seq, end, plan.step);
            }
        }
    }

    /// A chunk of known tokens is planned up to `end`: its full blocks are shared from now on (R5).
    fn prefilled(&mut self, seq: SeqId, end: Tokens, step: StepId) {
        let sequence = self
            .sequences
            .get_mut(&seq)
            .expect("a planned sequence is known");
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

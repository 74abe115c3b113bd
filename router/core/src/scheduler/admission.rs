//! Waiting sequences, in order of arrival, as long as whole prompts fit.

use crate::budget::StepBudget;
use crate::event::{SeqEvent, WaitReason};
use crate::ids::{Blocks, SeqId, Tokens};
use crate::kv::table::BlockTable;
use crate::mutation::Mutation;
use crate::plan::{SlotBinding, StepPlan};
use crate::scheduler::{Draft, PlannedStep, Scheduler, block_count};
use crate::sequence::{Binding, Phase, Sequence};

// === impl Scheduler ===

impl Scheduler {
    /// Admits from the front of the queue until something lacks, and says what. Nobody is
    /// overtaken.
    pub(super) fn admit_waiting(
        &mut self,
        budget: &mut StepBudget,
        plan: &mut StepPlan,
        step: &mut PlannedStep,
    ) -> Option<WaitReason> {
        let mut owed = self.owed();
        while let Some(seq) = self.queue.front() {
            if let Some(reason) = self.lacks_a_place(seq, budget) {
                return Some(reason);
            }
            self.look_up(seq);
            let sequence = &self.sequences[seq];
            let found = block_count(self.found.len());
            let whole = self.whole(sequence);
            let takes = Blocks(whole.0 - found.0 + self.kv.unleased_of(&self.found).0);
            let free = self.kv.free();
            if free.0 < takes.0 + owed.0 + self.reserve(sequence).0 {
                return Some(WaitReason::Blocks);
            }
            let start = self.limits.block_size.span(found);
            let told = sequence.owes_logprobs();
            let len = Tokens(budget.chunk(start, sequence.len(), told));
            if len == Tokens(0) {
                return Some(WaitReason::Budget);
            }
            self.queue.pop_front();
            self.start(seq, plan);
            let growth = self.lacks(&self.sequences[seq], Tokens(start.0 + len.0));
            owed.0 += whole.0.saturating_sub(found.0 + growth.0);
            self.emit(
                Draft {
                    seq,
                    phase: Phase::Prefill,
                    len,
                    growth,
                },
                plan,
                step,
            );
        }
        None
    }

    /// What a waiting sequence lacks whatever its length is.
    fn lacks_a_place(&self, seq: SeqId, budget: &StepBudget) -> Option<WaitReason> {
        let needs_state = self.sequences[seq].request.sampling.needs_history();
        if self.recovering.is_some() {
            Some(WaitReason::Recovery)
        } else if self.running.len() >= self.limits.running_max as usize
            || !self.slots.can_bind(false)
        {
            Some(WaitReason::Slots)
        } else if !budget.has_prefill() {
            Some(WaitReason::Budget)
        } else if !self.slots.can_bind(needs_state) {
            Some(WaitReason::State)
        } else {
            None
        }
    }

    /// Blocks that the whole of a sequence and its next token need.
    fn whole(&self, sequence: &Sequence) -> Blocks {
        self.limits.block_size.ceil(Tokens(sequence.len().0 + 1))
    }

    /// Blocks that running sequences still lack for what they were admitted with.
    fn owed(&self) -> Blocks {
        let mut owed = 0;
        for &seq in &self.running {
            let sequence = &self.sequences[seq];
            if sequence.is_prefilling() {
                let has = block_count(sequence.running().table.len());
                owed += self.whole(sequence).0.saturating_sub(has.0);
            }
        }
        Blocks(owed)
    }

    /// Blocks that must stay free beside the sequence: one per running sequence for one that comes
    /// back (R6), else the watermark, and nothing when nothing runs.
    fn reserve(&self, sequence: &Sequence) -> Blocks {
        if self.running.is_empty() {
            Blocks(0)
        } else if sequence.preempted {
            let unguarded = self.seeded.is(Mutation::RecoveryUnguarded);
            if unguarded {
                Blocks(0)
            } else {
                block_count(self.running.len())
            }
        } else if self.seeded.is(Mutation::WatermarkIgnored) {
            Blocks(0)
        } else {
            self.limits.watermark
        }
    }

    /// The sequence's longest cached prefix, into `found`.
    fn look_up(&mut self, seq: SeqId) {
        let sequence = &self.sequences[seq];
        if sequence.owes_logprobs() && !self.seeded.is(Mutation::LogprobsTakeMatch) {
            self.found.clear();
            return;
        }
        let search = self.search(sequence);
        self.kv.find(
            &BlockTable::new(),
            &sequence.tokens,
            search,
            &mut self.found,
        );
    }

    /// `Waiting` to `Prefilling`: binds a slot and leases what was found.
    fn start(&mut self, seq: SeqId, plan: &mut StepPlan) {
        let waited_for = self
            .held_up
            .and_then(|(reason, newcomers)| (seq < newcomers).then_some(reason));
        let sequence = &mut self.sequences[seq];
        let needs_state = sequence.request.sampling.needs_history();
        let bound = self.slots.bind(seq, needs_state);
        let mut table = BlockTable::new();
        self.kv.lease(&mut table, &self.found);
        let cached = self.limits.block_size.span(block_count(self.found.len()));
        let mut history = if needs_state {
            sequence.tokens.clone()
        } else {
            Vec::new()
        };
        if self.seeded.is(Mutation::HistoryOneShort) {
            history.pop();
        }
        plan.bindings.push(SlotBinding {
            slot: bound.slot,
            generation: bound.generation,
            sampling: sequence.request.sampling.clone(),
            ending: sequence.request.ending.clone(),
            history,
            prompt_len: sequence.prompt_len(),
            state_slot: bound.state_slot,
        });
        if !std::mem::replace(&mut sequence.started, true) {
            self.events.push(SeqEvent::Started {
                seq,
                cached: cached.0,
                waited_for,
            });
        }
        if std::mem::take(&mut sequence.preempted) {
            self.recovering = Some(seq);
        }
        sequence.bind(Binding {
            slot: bound.slot,
            generation: bound.generation,
            table,
            planned: cached,
            in_flight: 0,
            proven: Tokens(0),
        });
        self.stats.cached_tokens += u64::from(cached.0);
        let at = self.running.partition_point(|&other| other < seq);
        self.running.insert(at, seq);
    }
}

//! What the referee refuses before anything is computed: R1, R4, R10, and columns, slots and tables
//! that do not fit together.

use rustc_hash::FxHashSet;

use crate::ids::StateSlot;
use crate::plan::{SlotBinding, StepPlan, row_flag};
use crate::testing::symbolic::{Referee, RowView, unsigned};

// === impl Referee ===

impl Referee {
    /// Receives a plan: what can be judged without running it.
    ///
    /// # Panics
    /// When the plan breaks R1, R4 or R10, or its columns do not fit together.
    pub fn receive(&mut self, plan: StepPlan) {
        assert_eq!(
            plan.step, self.next_step,
            "R1: steps come in order and without gaps"
        );
        self.next_step = plan.step.next();
        for binding in &plan.bindings {
            let slot = binding.slot.0.cast_signed();
            for earlier in &self.pending {
                assert!(
                    !earlier.row_slot.contains(&slot),
                    "R4: step {} binds slot {slot}, which step {} in flight names",
                    plan.step,
                    earlier.step
                );
            }
        }
        for block in &plan.zero_block {
            self.condemned.remove(block);
        }
        for block in &plan.append_block {
            assert!(
                !self.condemned.contains(block),
                "R10: block {block} is reused with its NaN"
            );
        }
        let rows = plan.rows();
        assert!(rows > 0, "step {} has no rows", plan.step);
        assert_eq!(
            plan.row_start.len(),
            rows,
            "row_start is a column of the rows"
        );
        assert_eq!(plan.row_len.len(), rows, "row_len is a column of the rows");
        assert_eq!(
            plan.row_flags.len(),
            rows,
            "row_flags is a column of the rows"
        );
        let tokens: u32 = plan.row_len.iter().map(|&len| unsigned(len)).sum();
        let tokens_max = self.limits.step_tokens_max;
        assert!(
            tokens <= tokens_max.0,
            "step {} has {tokens} tokens of {tokens_max}",
            plan.step
        );
        let is_told = |flags: i32| flags & row_flag::PROMPT_LOGPROBS != 0;
        let rows = plan.row_flags.iter().zip(&plan.row_len);
        let told: u32 = rows
            .filter(|(flags, _)| is_told(**flags))
            .map(|(_, &len)| unsigned(len))
            .sum();
        let told_max = self.limits.prompt_logprob_tokens_max;
        assert!(
            told <= told_max.0,
            "step {} tells logprobs of {told} tokens of {told_max}",
            plan.step
        );
        self.pending.push_back(plan);
    }

    pub(super) fn release(&mut self, plan: &StepPlan) {
        for &slot in &plan.release_slot {
            let entry = &mut self.slots[unsigned(slot) as usize];
            assert!(
                entry.binding.take().is_some(),
                "slot {slot} is released and was not bound"
            );
            entry.table.clear();
        }
    }

    pub(super) fn bind(&mut self, plan: &StepPlan) {
        for binding in &plan.bindings {
            let slot = binding.slot;
            let mut others = self.slots.iter().filter_map(|slot| slot.binding.as_ref());
            let taken = |other: &SlotBinding| {
                self.limits.state_slots > 0
                    && other.sampling.needs_history()
                    && other.state_slot == binding.state_slot
            };
            let needs_state = binding.sampling.needs_history();
            assert!(
                !needs_state || !others.any(taken),
                "two slots have one sampling state"
            );
            assert_eq!(
                needs_state,
                !binding.history.is_empty(),
                "history goes with penalties"
            );
            assert!(
                needs_state || binding.state_slot == StateSlot(0),
                "state without need"
            );
            let entry = &mut self.slots[slot.0 as usize];
            assert!(
                entry.binding.is_none(),
                "slot {slot} is bound and was not released"
            );
            assert!(
                entry.generation < binding.generation,
                "slot {slot} repeats a generation"
            );
            entry.generation = binding.generation;
            entry.binding = Some(binding.clone());
            entry.table.clear();
            entry.length = 0;
            entry.last_token = None;
        }
    }

    pub(super) fn append(&mut self, plan: &StepPlan) {
        let mut blocks = plan.append_block.iter();
        let appends = plan
            .append_slot
            .iter()
            .zip(&plan.append_at)
            .zip(&plan.append_len);
        for ((&slot, &at), &len) in appends {
            let entry = &mut self.slots[unsigned(slot) as usize];
            assert!(
                entry.binding.is_some(),
                "blocks are appended to slot {slot}, which is free"
            );
            assert_eq!(
                unsigned(at) as usize,
                entry.table.len(),
                "slot {slot} has a gap in its table"
            );
            for &block in blocks.by_ref().take(unsigned(len) as usize) {
                let block = unsigned(block);
                assert!(
                    block != 0 && block < self.limits.blocks.0,
                    "nobody may own block {block}"
                );
                assert!(
                    !entry.table.contains(&block),
                    "slot {slot} has block {block} twice"
                );
                entry.table.push(block);
            }
        }
        assert!(
            blocks.next().is_none(),
            "more blocks are appended than counted"
        );
    }

    /// The rows, checked against the slots.
    pub(super) fn views(&self, plan: &StepPlan) -> Vec<RowView> {
        let mut token_at = 0;
        let mut seen = FxHashSet::default();
        let mut views = Vec::with_capacity(plan.rows());
        for row in 0..plan.rows() {
            let slot = unsigned(plan.row_slot[row]) as usize;
            let (start, len) = (unsigned(plan.row_start[row]), unsigned(plan.row_len[row]));
            let flags = plan.row_flags[row];
            let entry = &self.slots[slot];
            assert!(
                entry.binding.is_some(),
                "row {row} is of slot {slot}, which is not bound"
            );
            assert!(seen.insert(slot), "slot {slot} has two rows in one step");
            assert!(len > 0, "row {row} computes nothing");
            let room = entry.table.len() * self.limits.block_size.tokens().0 as usize;
            assert!(
                (start + len) as usize <= room,
                "row {row} writes beyond its table"
            );
            if flags & row_flag::FROM_SLOT != 0 {
                assert_eq!(len, 1, "row {row} takes one token from its slot");
                assert!(
                    entry.last_token.is_some(),
                    "slot {slot} has no last token yet"
                );
            }
            if start != entry.length {
                // A match was leased: at the start, or between chunks that end with a block (R5).
                let bs = self.limits.block_size.tokens().0;
                let leased = start > entry.length
                    && start.is_multiple_of(bs)
                    && entry.length.is_multiple_of(bs);
                assert!(
                    leased,
                    "row {row} starts at {start}, its slot is at {}",
                    entry.length
                );
            }
            views.push(RowView {
                row,
                slot,
                start,
                len,
                flags,
                token_at,
            });
            token_at += if flags & row_flag::FROM_SLOT == 0 {
                len as usize
            } else {
                0
            };
        }
        assert_eq!(
            token_at,
            plan.token_id.len(),
            "the rows have other ids than the plan"
        );
        views
    }
}

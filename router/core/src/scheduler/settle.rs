//! Running sequences first: the growth of all of them is counted, and settled by preemption, before
//! any row is written (R6).

use crate::budget::{PromptAllowance, StepBudget};
use crate::ids::{Blocks, SeqId, Tokens};
use crate::kv::tree::Search;
use crate::mutation::Mutation;
use crate::scheduler::{Draft, Scheduler, block_count};
use crate::sequence::{Phase, SeqState, Sequence};

// === impl Scheduler ===

impl Scheduler {
    /// Decides a row for every running sequence that can have one, into `drafts`. Gives what is left
    /// of the step's budget, and whether sequences were preempted for it.
    pub(super) fn settle(&mut self, allowance: &PromptAllowance) -> (StepBudget, bool) {
        self.match_again();
        let mut preempted = false;
        loop {
            let budget = self.draft(allowance);
            let wanted = Blocks(self.drafts.iter().map(|draft| draft.growth.0).sum());
            let free = self.kv.free();
            if wanted <= free {
                return (budget, preempted);
            }
            let victim = self.victim(Blocks(wanted.0 - free.0));
            self.preempt(victim);
            preempted = true;
        }
    }

    /// What a sequence may lease in the plan that is being made.
    pub(super) fn search(&self, sequence: &Sequence) -> Search {
        let alone =
            !self.limits.share_within_step && !self.seeded.is(Mutation::ShareWithinStepForced);
        Search {
            not_of: alone.then_some(self.next_step),
            proven_only: sequence.wary,
        }
    }

    /// Blocks that `sequence` lacks for cells up to `end`.
    pub(super) fn lacks(&self, sequence: &Sequence, end: Tokens) -> Blocks {
        let end = if self.seeded.is(Mutation::GrowthOneShort) {
            Tokens(end.0 - 1)
        } else {
            end
        };
        let has = sequence.binding().map_or(0, |binding| binding.table.len());
        Blocks(
            self.limits
                .block_size
                .ceil(end)
                .0
                .saturating_sub(block_count(has).0),
        )
    }

    /// Prefilling sequences without a private block lease what others have planned since (R5).
    fn match_again(&mut self) {
        for i in 0..self.running.len() {
            let sequence = &self.sequences[self.running[i]];
            if !sequence.is_prefilling() || sequence.owes_logprobs() {
                continue;
            }
            let search = self.search(sequence);
            let table = &sequence.running().table;
            self.kv
                .find(table, &sequence.tokens, search, &mut self.found);
            if self.found.is_empty() {
                continue;
            }
            let sequence = &mut self.sequences[self.running[i]];
            let binding = sequence.running_mut();
            self.kv.lease(&mut binding.table, &self.found);
            let before = binding.planned;
            binding.planned = self
                .limits
                .block_size
                .span(block_count(binding.table.len()));
            self.stats.cached_tokens += u64::from(binding.planned.0 - before.0);
        }
    }

    /// One token for every decoding sequence, then chunks for the prefilling ones, oldest first.
    fn draft(&mut self, allowance: &PromptAllowance) -> StepBudget {
        self.drafts.clear();
        let mut budget = StepBudget::new(&self.limits, allowance, self.seeded);
        let mut prefilling = false;
        for &seq in &self.running {
            let sequence = &self.sequences[seq];
            prefilling |= sequence.is_prefilling();
            if sequence.wants_decode() && budget.decode() {
                let end = Tokens(sequence.running().planned.0 + 1);
                let growth = self.lacks(sequence, end);
                self.drafts.push(Draft {
                    seq,
                    phase: Phase::Decode,
                    len: Tokens(1),
                    growth,
                });
            }
        }
        if prefilling {
            self.draft_chunks(&mut budget);
        }
        budget
    }

    fn draft_chunks(&mut self, budget: &mut StepBudget) {
        for &seq in &self.running {
            let sequence = &self.sequences[seq];
            let SeqState::Prefilling(binding) = &sequence.state else {
                continue;
            };
            let start = binding.planned;
            let told = sequence.owes_logprobs();
            let len = Tokens(budget.chunk(start, sequence.len(), told));
            if len > Tokens(0) {
                let growth = self.lacks(sequence, Tokens(start.0 + len.0));
                self.drafts.push(Draft {
                    seq,
                    phase: Phase::Prefill,
                    len,
                    growth,
                });
            }
        }
    }

    /// The sequence that gives enough with the least left over; if none gives enough, the one that
    /// gives most; the youngest of equals. What it gives are the blocks that it alone holds and those
    /// it would have taken. The oldest never does: so somebody always finishes.
    fn victim(&self, shortfall: Blocks) -> SeqId {
        let spared = usize::from(!self.seeded.is(Mutation::OldestIsVictim));
        let mut best: Option<((bool, i64), SeqId)> = None;
        for &seq in &self.running[spared.min(self.running.len())..] {
            let alone = self.kv.alone(&self.sequences[seq].running().table);
            let gives = i64::from(alone.0) + i64::from(self.growth_of(seq).0);
            let enough = gives >= i64::from(shortfall.0);
            let rank = (enough, if enough { -gives } else { gives });
            if best.is_none_or(|(other, _)| rank >= other) {
                best = Some((rank, seq));
            }
        }
        best.expect("the oldest sequence fits alone (R9); this is a router bug")
            .1
    }

    /// The growth that is drafted for a sequence.
    fn growth_of(&self, seq: SeqId) -> Blocks {
        // Decode rows, then chunks, each in order of arrival.
        let split = self
            .drafts
            .partition_point(|draft| draft.phase == Phase::Decode);
        let (decode, chunks) = self.drafts.split_at(split);
        let find = |drafts: &[Draft]| {
            let at = drafts.binary_search_by_key(&seq, |draft| draft.seq).ok();
            at.map(|at| drafts[at].growth)
        };
        find(decode).or_else(|| find(chunks)).unwrap_or_default()
    }

    /// Recomputation later: blocks go, tokens stay, and the sequence waits at its place of arrival,
    /// in front of all that never ran.
    fn preempt(&mut self, seq: SeqId) {
        self.requeue(seq, None);
        self.stats.preemptions += 1;
        let sequence = &mut self.sequences[seq];
        sequence.preempted = true;
        if self.seeded.is(Mutation::PreemptionForgetsToken) && sequence.generated() > 0 {
            sequence.tokens.pop();
        }
    }
}

//! The scheduler: decides what runs in a step, as a value, and learns what came of it.
//!
//! Four verbs. [`Scheduler::admit`] puts a request in the queue. [`Scheduler::plan`] makes the next
//! step: first the running sequences are settled ([`settle`]), then waiting ones are admitted
//! ([`admission`]); rows are written by [`emit`]. [`Scheduler::commit`] takes a step's result ([`commit`]). [`Scheduler::finish`]
//! ends a sequence from outside. And [`Scheduler::reset`] starts over when the shards did (R8).

mod admission;
mod commit;
mod emit;
mod settle;

use std::collections::VecDeque;

pub use self::commit::CommitError;
use crate::budget::PromptAllowance;
use crate::event::{FinishReason, SeqEvent, WaitReason};
use crate::ids::{BlockId, Blocks, Generation, SeqId, SlotId, StepId, Tokens};
use crate::kv::{KvCache, Taint};
use crate::limits::Limits;
use crate::mutation::{Mutation, Seeded};
use crate::plan::StepPlan;
use crate::queue::WaitQueue;
use crate::request::Request;
use crate::sequence::{Phase, Sequence, Sequences};
use crate::slots::SlotPool;

/// Why a request is not taken into the queue.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    /// As many sequences wait as may.
    #[error("{waiting} requests are waiting and at most {queue_max} may")]
    QueueFull {
        /// Sequences that wait.
        waiting: usize,
        /// How many may.
        queue_max: usize,
    },
}

/// A look at the books. Gauges are of now, counters of the scheduler's whole life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences in the queue.
    pub waiting: usize,
    /// Sequences that hold a slot.
    pub running: usize,
    /// Plans in flight.
    pub in_flight: u32,
    /// Blocks that can be had: free, or cached and not leased.
    pub blocks_free: u32,
    /// Blocks in the prefix tree, leased or not.
    pub blocks_cached: u32,
    /// Counter: preemptions for lack of blocks.
    pub preemptions: u64,
    /// Counter: sequences sent back because of somebody else's NaN.
    pub requeued: u64,
    /// Counter: masks that came too late (R7).
    pub masks_missed: u64,
    /// Counter: tokens of known text that were planned for computation, recomputation included.
    pub prefill_tokens: u64,
    /// Counter: tokens of known text that came from the prefix tree.
    pub cached_tokens: u64,
    /// Counter: tokens drawn and kept.
    pub generated_tokens: u64,
    /// Counter: tokens dropped because their sequence had gone (R3).
    pub zombie_rows: u64,
}

/// What the next plan has before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences that take a decode row.
    pub decode_rows: u32,
    /// Positions that those rows attend to, together.
    pub decode_context: u64,
    /// Known tokens that are not planned yet, of running and of waiting sequences. Those of a
    /// sequence that waits count whole, whatever the prefix tree may hold of them.
    pub backlog: u64,
}

/// A row of the newest plan that waits for a mask, as long as it is its sequence's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaskedRow {
    /// The row.
    pub row: i32,
    /// Whose it is.
    pub seq: SeqId,
    /// New tokens before the one that it draws: the mask is the one after so many.
    pub after: u32,
}

/// A row of a plan in flight, as far as `commit` needs it.
#[derive(Debug, Clone, Copy)]
struct PlannedRow {
    slot: SlotId,
    generation: Generation,
    /// Cells that are written when the row has run.
    end: Tokens,
    len: Tokens,
    sampled: bool,
    masked: bool,
    logprobs: bool,
    /// The block of the row's last cell.
    tail: BlockId,
}

#[derive(Debug, Default)]
struct PlannedStep {
    step: StepId,
    rows: Vec<PlannedRow>,
}

/// A row that is decided and not yet written.
#[derive(Debug, Clone, Copy)]
struct Draft {
    seq: SeqId,
    phase: Phase,
    len: Tokens,
    /// Blocks that the table lacks for it.
    growth: Blocks,
}

/// The router's brain. A value: no clock, no device, no text.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    sequences: Sequences,
    queue: WaitQueue,
    /// Ids of the sequences that hold a slot, ascending: in order of arrival.
    running: Vec<SeqId>,
    kv: KvCache,
    slots: SlotPool,
    in_flight: VecDeque<PlannedStep>,
    next_step: StepId,
    next_seq: SeqId,
    /// The preempted sequence that is on its way back (R6).
    recovering: Option<SeqId>,
    /// What held the queue up when it last was, and the id from which on sequences were not there.
    held_up: Option<(WaitReason, SeqId)>,
    /// Slots given up since the last plan: the next one tells the shards.
    released: Vec<i32>,
    /// Events made by `plan`, told by the next call that has somewhere to put them.
    events: Vec<SeqEvent>,
    stats: Stats,
    drafts: Vec<Draft>,
    found: Vec<BlockId>,
    spare_rows: Vec<PlannedRow>,
    spare_plan: StepPlan,
    seeded: Seeded,
}

// === impl Scheduler ===

impl Scheduler {
    /// An empty scheduler; its first plan is step 0.
    pub fn new(limits: Limits) -> Self {
        Self::seeded(limits, Seeded::default())
    }

    /// A scheduler with a mistake in it.
    #[cfg(feature = "testing")]
    pub fn with_mutation(limits: Limits, mutation: Mutation) -> Self {
        Self::seeded(limits, Seeded::with(mutation))
    }

    fn seeded(limits: Limits, seeded: Seeded) -> Self {
        Self {
            kv: KvCache::new(&limits, seeded),
            slots: SlotPool::new(limits.slots, limits.state_slots, StepId(0), seeded),
            limits,
            sequences: Sequences::default(),
            queue: WaitQueue::default(),
            running: Vec::new(),
            in_flight: VecDeque::new(),
            next_step: StepId(0),
            next_seq: SeqId(0),
            recovering: None,
            held_up: None,
            released: Vec::new(),
            events: Vec::new(),
            stats: Stats::default(),
            drafts: Vec::new(),
            found: Vec::new(),
            spare_rows: Vec::new(),
            spare_plan: StepPlan::default(),
            seeded,
        }
    }

    /// What the group can do.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes a checked request into the queue.
    pub fn admit(&mut self, request: Request) -> Result<SeqId, AdmitError> {
        let (waiting, queue_max) = (self.queue.len(), self.limits.queue_max);
        if waiting >= queue_max {
            return Err(AdmitError::QueueFull { waiting, queue_max });
        }
        let id = self.next_seq;
        self.next_seq.0 += 1;
        self.sequences.insert(Sequence::new(id, request));
        self.queue.put(id);
        Ok(id)
    }

    /// Decides the next step. `None`: nothing can run until something is committed or admitted, or
    /// as many plans are in flight as may be.
    pub fn plan(&mut self) -> Option<StepPlan> {
        self.plan_within(&PromptAllowance::UNLIMITED)
    }

    /// As [`Scheduler::plan`], with prompt tokens that cost no more than `allowance` says. Rows of
    /// decoding sequences are not bounded by it.
    pub fn plan_within(&mut self, allowance: &PromptAllowance) -> Option<StepPlan> {
        if self.in_flight() >= self.limits.depth {
            return None;
        }
        let mut plan = std::mem::take(&mut self.spare_plan);
        plan.step = self.next_step;
        let mut step = PlannedStep {
            step: plan.step,
            rows: std::mem::take(&mut self.spare_rows),
        };

        let (mut budget, preempted) = self.settle(allowance);
        let drafts = std::mem::take(&mut self.drafts);
        for &draft in &drafts {
            self.emit(draft, &mut plan, &mut step);
        }
        self.drafts = drafts;
        let lacking = if !preempted || self.seeded.is(Mutation::RecoveryUnguarded) {
            self.admit_waiting(&mut budget, &mut plan, &mut step)
        } else {
            Some(WaitReason::Recovery)
        };
        if let Some(reason) = lacking {
            self.held_up = Some((reason, self.next_seq));
        }

        if step.rows.is_empty() {
            self.spare_plan = plan;
            self.spare_rows = step.rows;
            return None;
        }
        plan.release_slot.append(&mut self.released);
        self.in_flight.push_back(step);
        self.next_step = self.next_step.next();
        Some(plan)
    }

    /// Hands over what `plan` had to tell: which sequences it started. Optional; the next commit
    /// tells it otherwise, a step later.
    pub fn take_events(&mut self, events: &mut Vec<SeqEvent>) {
        events.append(&mut self.events);
    }

    /// The rows of the newest plan in flight that wait for a mask (R7), ascending, into `rows`; whether
    /// there were any when it was planned. A row whose sequence has ended or was sent back since is
    /// left out: nobody takes its token.
    pub fn masked_rows(&self, rows: &mut Vec<MaskedRow>) -> bool {
        rows.clear();
        let Some(step) = self.in_flight.back() else {
            return false;
        };
        for (row, planned) in (0i32..).zip(&step.rows).filter(|(_, row)| row.masked) {
            if let Some(seq) = self.owner(planned) {
                let after = planned.end.0 - self.sequences[seq].prompt_len().0;
                rows.push(MaskedRow { row, seq, after });
            }
        }
        step.rows.iter().any(|row| row.masked)
    }

    /// Takes back a plan that has been sent, so that the next one reuses its memory. Optional.
    pub fn recycle(&mut self, mut plan: StepPlan) {
        plan.clear();
        self.spare_plan = plan;
    }

    /// Ends a sequence for a reason of the caller's. One that has ended already is none of ours.
    pub fn finish(&mut self, seq: SeqId, reason: FinishReason, events: &mut Vec<SeqEvent>) {
        events.append(&mut self.events);
        if self.sequences.get(seq).is_some() {
            self.end(seq, reason, None, events);
        }
    }

    /// The group was lost and is back, with these limits and numbered from `first_step` (R8): tree,
    /// slots and blocks are new, and every sequence waits again in order of arrival. One that cannot
    /// finish alone under the new limits ends; the events that say so are returned.
    pub fn reset(&mut self, limits: Limits, first_step: StepId) -> Vec<SeqEvent> {
        let mut events = std::mem::take(&mut self.events);
        self.kv = KvCache::new(&limits, self.seeded);
        self.slots = SlotPool::new(limits.slots, limits.state_slots, first_step, self.seeded);
        self.in_flight.clear();
        self.released.clear();
        self.recovering = None;
        if !self.seeded.is(Mutation::ResetKeepsNumbering) {
            self.next_step = first_step;
        }
        for seq in std::mem::take(&mut self.running) {
            let sequence = &mut self.sequences[seq];
            // Its table and slot are of a world that is gone.
            drop(sequence.unbind());
            self.queue.put(seq);
        }
        let tokens_max = limits.sequence_tokens_max();
        self.limits = limits;
        let mut unfit = Vec::new();
        for sequence in self.sequences.iter_mut() {
            sequence.preempted = false;
            sequence.wary = false;
            let total = sequence.prompt_len().0 + sequence.request.tokens_max.0;
            if total > tokens_max.0 {
                unfit.push(sequence.id);
            }
        }
        unfit.sort_unstable();
        for seq in unfit {
            self.end(seq, FinishReason::GroupLost, None, &mut events);
        }
        events
    }

    /// What the next plan has before it. Waiting sequences are counted until the backlog has
    /// `enough` tokens.
    pub fn load(&self, enough: u64) -> Load {
        let mut load = Load::default();
        for &seq in &self.running {
            let sequence = &self.sequences[seq];
            let planned = sequence.running().planned;
            if sequence.wants_decode() {
                load.decode_rows += 1;
                load.decode_context += u64::from(planned.0) + 1;
            } else if sequence.is_prefilling() {
                load.backlog += u64::from(sequence.len().0 - planned.0);
            }
        }
        for seq in self.queue.iter() {
            if load.backlog >= enough {
                break;
            }
            load.backlog += u64::from(self.sequences[seq].len().0);
        }
        load
    }

    /// Plans that are not committed.
    pub fn in_flight(&self) -> u32 {
        u32::try_from(self.in_flight.len()).expect("at most `depth` plans are in flight")
    }

    /// Whether no sequence is left and no result is awaited.
    pub fn is_idle(&self) -> bool {
        self.sequences.len() == 0 && self.in_flight.is_empty()
    }

    /// The books as they stand.
    pub fn stats(&self) -> Stats {
        Stats {
            waiting: self.queue.len(),
            running: self.running.len(),
            in_flight: self.in_flight(),
            blocks_free: self.kv.free().0,
            blocks_cached: self.kv.cached().0,
            ..self.stats
        }
    }

    /// Recounts everything.
    ///
    /// # Panics
    /// With a sentence, when the books do not balance.
    pub fn audit(&self) {
        let running = self
            .running
            .iter()
            .map(|&seq| self.sequences[seq].running());
        self.kv.audit(running.map(|binding| &binding.table));
        self.slots.audit(self.running.len());
        self.queue.audit();
        assert_eq!(
            self.queue.len() + self.running.len(),
            self.sequences.len(),
            "a sequence is neither waiting nor running, or both"
        );
        assert!(
            self.running.is_sorted(),
            "running sequences are not in order of arrival"
        );
        for &seq in &self.running {
            let (sequence, binding) = (&self.sequences[seq], self.sequences[seq].running());
            let owner = self.slots.owner(binding.slot, binding.generation);
            assert_eq!(
                owner,
                Some(seq),
                "slot {} is not its sequence's",
                binding.slot
            );
            let room = self
                .limits
                .block_size
                .span(block_count(binding.table.len()));
            assert!(
                binding.planned <= room,
                "sequence {seq} has cells beyond its table"
            );
            if !sequence.is_prefilling() {
                let ahead = sequence.len().0 + binding.in_flight;
                assert_eq!(
                    binding.planned.0 + 1,
                    ahead,
                    "sequence {seq} is out of step"
                );
            }
        }
    }

    /// Sequences that hold a slot, in order of arrival.
    #[cfg(feature = "testing")]
    pub fn running(&self) -> impl Iterator<Item = SeqId> {
        self.running.iter().copied()
    }

    /// Who holds a slot now, and under which generation.
    #[cfg(feature = "testing")]
    pub fn holder(&self, slot: SlotId) -> Option<(SeqId, Generation)> {
        self.slots.holder(slot)
    }

    /// Slots in quarantine, and the step that each waits for (R4).
    #[cfg(feature = "testing")]
    pub fn quarantined(&self) -> impl Iterator<Item = (SlotId, StepId)> {
        self.slots.quarantined()
    }

    /// Ends a sequence: everything it holds is given back.
    fn end(
        &mut self,
        seq: SeqId,
        reason: FinishReason,
        taint: Option<Taint>,
        events: &mut Vec<SeqEvent>,
    ) {
        if !self.unbind(seq, taint) {
            self.queue.remove(seq);
        }
        self.sequences.remove(seq);
        events.push(SeqEvent::Finished { seq, reason });
    }

    /// Takes slot and blocks from a sequence, at once (its rows in flight are zombies now, R3);
    /// `false` when it has none. `taint` overrides what is known of its private blocks.
    fn unbind(&mut self, seq: SeqId, taint: Option<Taint>) -> bool {
        let sequence = &mut self.sequences[seq];
        let Some(binding) = sequence.unbind() else {
            return false;
        };
        let taint = taint.unwrap_or_else(|| binding.taint());
        self.kv.release(binding.table, taint);
        self.slots.release(binding.slot);
        self.released.push(binding.slot.0.cast_signed());
        let at = self
            .running
            .binary_search(&seq)
            .expect("a bound sequence is in `running`");
        self.running.remove(at);
        if self.recovering == Some(seq) {
            self.recovering = None;
        }
        true
    }

    /// Sends a running sequence back to its place in the queue; its tokens stay.
    fn requeue(&mut self, seq: SeqId, taint: Option<Taint>) {
        let bound = self.unbind(seq, taint);
        assert!(
            bound,
            "sequence {seq} is sent back but does not run; this is a router bug"
        );
        self.queue.put(seq);
    }
}

/// The length of a table as a quantity.
fn block_count(len: usize) -> Blocks {
    Blocks(u32::try_from(len).expect("block ids are u32"))
}

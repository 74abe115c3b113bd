//! The referee: a shard made of hashes.
//!
//! Each KV cell stores the hash of the whole prefix that produced it. Executing a plan writes cells,
//! then checks that every row reads exactly its own prefix, that no two rows write one cell, and that
//! slots are bound and released in order; the "model" returns a token computed from that hash. So any
//! mistake of the scheduler, the allocator or the tree is a panic here, with a sentence, or a token
//! that differs from [`Model::generate`].

mod judge;
mod model;

use std::collections::VecDeque;

use rustc_hash::FxHashSet;

pub use self::model::{Model, extend};
use crate::ids::{Generation, SlotId, StepId, TokenId, Tokens};
use crate::limits::Limits;
use crate::plan::{SlotBinding, StepPlan, StepResult, result_flag, row_flag};
use crate::testing::symbolic::model::{EMPTY, mix};

/// A draw that is about to happen, for scripts.
#[derive(Debug, Clone, Copy)]
pub struct Draw<'a> {
    /// The step.
    pub step: StepId,
    /// The row.
    pub row: usize,
    /// Its slot's binding.
    pub binding: &'a SlotBinding,
    /// Hash of every token so far.
    pub prefix: u64,
    /// The position of the token to draw.
    pub position: Tokens,
}

/// Decides single draws instead of the model: `None` leaves it to the model.
pub type Script = Box<dyn FnMut(&Draw<'_>) -> Option<TokenId> + Send>;

/// How a row is made to go wrong (R10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The row's logits hold a NaN; its cells are fine.
    Logits,
    /// Every cell that the row writes holds a NaN.
    Cells,
    /// The row's mask does not come (R7): it draws another token than it should.
    Mask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cell {
    /// Zeroed, or never written.
    Zero,
    /// The hash of the prefix up to here, and its last token.
    Prefix(u64, TokenId),
    Nan,
}

#[derive(Debug)]
struct Slot {
    binding: Option<SlotBinding>,
    generation: Generation,
    table: Vec<u32>,
    /// Cells written by this binding's rows, or leased and passed over.
    length: u32,
    last_token: Option<TokenId>,
}

#[derive(Debug, Clone, Copy)]
struct RowView {
    row: usize,
    slot: usize,
    start: u32,
    len: u32,
    flags: i32,
    /// Where its ids start in `token_id`.
    token_at: usize,
}

/// The fake shard. A pure value: what it returns depends on the plans alone.
pub struct Referee {
    limits: Limits,
    model: Model,
    script: Option<Script>,
    faults: Vec<(usize, Fault)>,
    forced: Vec<(usize, TokenId)>,
    next_step: StepId,
    /// Plans received and not executed.
    pending: VecDeque<StepPlan>,
    slots: Vec<Slot>,
    cells: Vec<Cell>,
    /// Blocks that hold a NaN, as the scheduler has been told.
    condemned: FxHashSet<i32>,
}

// === impl Referee ===

impl Referee {
    /// A zeroed shard that expects step `first_step`.
    #[must_use]
    pub fn new(limits: &Limits, model: Model, first_step: StepId) -> Self {
        let cells = limits.block_size.span(limits.blocks).0 as usize;
        let slot = |_| Slot {
            binding: None,
            generation: Generation(0),
            table: Vec::new(),
            length: 0,
            last_token: None,
        };
        Self {
            slots: (0..limits.slots).map(slot).collect(),
            limits: limits.clone(),
            model,
            script: None,
            faults: Vec::new(),
            forced: Vec::new(),
            next_step: first_step,
            pending: VecDeque::new(),
            cells: vec![Cell::Zero; cells],
            condemned: FxHashSet::default(),
        }
    }

    /// Lets `script` decide single draws.
    pub fn set_script(&mut self, script: Script) {
        self.script = Some(script);
    }

    /// Makes row `row` of the next step that is executed go wrong.
    pub fn inject(&mut self, row: usize, fault: Fault) {
        self.faults.push((row, fault));
    }

    /// Makes row `row` of the next step that is executed draw `token`.
    pub fn force(&mut self, row: usize, token: TokenId) {
        self.forced.push((row, token));
    }

    /// The scheduler is about to learn of a NaN in a live row of `slot`: from now on nobody is given
    /// a block with a NaN from its table, unless it is zeroed (R10).
    pub fn condemn(&mut self, slot: SlotId) {
        let bs = self.limits.block_size.tokens().0;
        for &block in &self.slots[slot.0 as usize].table {
            if (0..bs).any(|offset| self.cells[self.cell(block, offset)] == Cell::Nan) {
                self.condemned.insert(block.cast_signed());
            }
        }
    }

    /// Receives and executes a plan at once.
    ///
    /// # Panics
    /// When the plan breaks a rule.
    pub fn execute(&mut self, plan: &StepPlan) -> StepResult {
        self.receive(plan.clone());
        let result = self.step();
        result.expect("a plan was just received")
    }

    /// Executes the oldest plan received; `None` when there is none.
    ///
    /// # Panics
    /// When the plan breaks a rule.
    pub fn step(&mut self) -> Option<StepResult> {
        let plan = self.pending.pop_front()?;
        self.release(&plan);
        self.bind(&plan);
        for &block in &plan.zero_block {
            let at = self.cell(unsigned(block), 0);
            let len = self.limits.block_size.tokens().0 as usize;
            self.cells[at..at + len].fill(Cell::Zero);
        }
        self.append(&plan);
        let rows = self.views(&plan);
        let before = self.read_before(&rows);
        let mut written = FxHashSet::default();
        for &view in &rows {
            self.write(&plan, view, &mut written);
        }
        if !self.limits.share_within_step {
            for (view, seen) in rows.iter().zip(before) {
                let now = self.prefix(*view);
                assert_eq!(
                    seen, now,
                    "R5: a row reads a cell that another row of its step writes"
                );
            }
        }
        Some(self.sample(&plan, &rows))
    }

    /// What every row's prefix is before the step writes, where that matters.
    fn read_before(&self, rows: &[RowView]) -> Vec<Option<u64>> {
        if self.limits.share_within_step {
            return Vec::new();
        }
        rows.iter().map(|&view| self.prefix(view)).collect()
    }

    /// The hash of the cells in front of a row; `None` when one is not a number.
    fn prefix(&self, view: RowView) -> Option<u64> {
        let mut hash = EMPTY;
        let mut number = true;
        for position in 0..view.start {
            match self.cells[self.cell_of(view.slot, position)] {
                Cell::Prefix(stored, token) if number => {
                    hash = extend(hash, token);
                    assert_eq!(
                        stored, hash,
                        "row {} of slot {} reads a foreign cell at position {position}",
                        view.row, view.slot
                    );
                }
                Cell::Prefix(..) => {}
                Cell::Nan => number = false,
                Cell::Zero => panic!(
                    "row {} of slot {} reads position {position}, which nobody wrote",
                    view.row, view.slot
                ),
            }
        }
        number.then_some(hash)
    }

    /// Writes a row's cells. Rows come in the plan's order, and all are written before one is read,
    /// so a row may lean on cells that a row after it writes only through [`Self::prefix`].
    fn write(&mut self, plan: &StepPlan, view: RowView, written: &mut FxHashSet<usize>) {
        let fault = self.faults.contains(&(view.row, Fault::Cells));
        let mut hash = if fault { None } else { self.prefix(view) };
        for i in 0..view.len {
            let token = if view.flags & row_flag::FROM_SLOT == 0 {
                TokenId(unsigned(plan.token_id[view.token_at + i as usize]))
            } else {
                self.slots[view.slot]
                    .last_token
                    .expect("checked with the row")
            };
            assert!(
                token.0 < self.limits.vocab_size,
                "row {} has an unknown token",
                view.row
            );
            let position = (view.start + i) as usize;
            let binding = self.slots[view.slot]
                .binding
                .as_ref()
                .expect("checked with the row");
            if let Some(&known) = binding.history.get(position) {
                assert_eq!(
                    known, token,
                    "the history of slot {} is not its prefix",
                    view.slot
                );
            }
            let complete = binding.history.is_empty()
                || view.flags & row_flag::FROM_SLOT != 0
                || position < binding.history.len();
            assert!(complete, "the history of slot {} misses a token", view.slot);
            hash = hash.map(|hash| extend(hash, token));
            let at = self.cell_of(view.slot, view.start + i);
            assert!(written.insert(at), "two rows of one step write one cell");
            self.cells[at] = hash.map_or(Cell::Nan, |hash| Cell::Prefix(hash, token));
        }
        self.slots[view.slot].length = view.start + view.len;
    }

    /// Whether attention over the row's blocks meets a NaN: also behind the row's end, where a
    /// backend multiplies what it masks by zero.
    fn meets_nan(&self, view: RowView) -> bool {
        let bs = self.limits.block_size.tokens().0;
        let end = (view.start + view.len).div_ceil(bs) * bs;
        (0..end).any(|position| self.cells[self.cell_of(view.slot, position)] == Cell::Nan)
    }

    fn sample(&mut self, plan: &StepPlan, rows: &[RowView]) -> StepResult {
        let mut result = StepResult {
            step: plan.step,
            device_time_us: 1,
            ..StepResult::default()
        };
        for &view in rows {
            self.report_prompt(view, &mut result);
            if view.flags & row_flag::SAMPLE == 0 {
                continue;
            }
            let faulty = self.faults.contains(&(view.row, Fault::Logits)) || self.meets_nan(view);
            let end = RowView {
                start: view.start + view.len,
                ..view
            };
            let prefix = if faulty { None } else { self.prefix(end) };
            let mut token = prefix.map_or(TokenId(0), |prefix| self.draw(plan.step, end, prefix));
            let missed = self.faults.contains(&(view.row, Fault::Mask));
            if missed {
                assert!(
                    view.flags & row_flag::MASKED != 0,
                    "a row that waits for no mask cannot miss it"
                );
                token = TokenId((token.0 + 1) % self.limits.vocab_size);
            }
            self.slots[view.slot].last_token = Some(token);
            result.row_index.push(column(view.row));
            result.token_id.push(token.0.cast_signed());
            let mut flags = 0;
            for (flag, set) in [
                (result_flag::NAN, prefix.is_none()),
                (result_flag::MASK_MISSED, missed),
            ] {
                flags |= if set { flag } else { 0 };
            }
            result.row_flags.push(flags);
            self.report(view, prefix, token, &mut result);
        }
        self.faults.clear();
        self.forced.clear();
        result
    }

    fn draw(&mut self, step: StepId, end: RowView, prefix: u64) -> TokenId {
        if let Some((_, token)) = self.forced.iter().find(|(row, _)| *row == end.row) {
            return *token;
        }
        let binding = self.slots[end.slot]
            .binding
            .as_ref()
            .expect("checked with the row");
        let draw = Draw {
            step,
            row: end.row,
            binding,
            prefix,
            position: Tokens(end.start),
        };
        let scripted = self.script.as_mut().and_then(|script| script(&draw));
        scripted.unwrap_or_else(|| self.model.draw(prefix, &binding.sampling))
    }

    /// Log-probability and alternatives of a drawn token, and what the ranks compare.
    fn report(&self, view: RowView, prefix: Option<u64>, token: TokenId, result: &mut StepResult) {
        let binding = self.slots[view.slot]
            .binding
            .as_ref()
            .expect("checked with the row");
        let top_n = if prefix.is_none() {
            0
        } else {
            binding.sampling.top_n
        };
        let after = extend(prefix.unwrap_or(EMPTY), token);
        let logprob = self.model.logprob(after);
        result.logprob.push(logprob);
        result.top_count.push(top_n.cast_signed());
        for i in 0..top_n {
            let id = TokenId((token.0 + i) % self.limits.vocab_size);
            result.top_token_id.push(id.0.cast_signed());
            result.top_logprob.push(logprob - i as f32);
        }
        result.digest = mix(result.digest ^ after);
    }

    fn report_prompt(&self, view: RowView, result: &mut StepResult) {
        if view.flags & row_flag::PROMPT_LOGPROBS == 0 {
            return;
        }
        for position in view.start..view.start + view.len {
            let told = match self.cells[self.cell_of(view.slot, position)] {
                Cell::Prefix(prefix, _) if position > 0 => self.model.prompt_token(prefix),
                Cell::Prefix(..) | Cell::Nan | Cell::Zero => Model::FIRST,
            };
            result.prompt_logprob.push(told.logprob);
            result.prompt_best_token.push(told.best.0.cast_signed());
            result.prompt_best_logprob.push(told.best_logprob);
        }
    }

    fn cell_of(&self, slot: usize, position: u32) -> usize {
        let bs = self.limits.block_size.tokens().0;
        self.cell(
            self.slots[slot].table[(position / bs) as usize],
            position % bs,
        )
    }

    fn cell(&self, block: u32, offset: u32) -> usize {
        (block * self.limits.block_size.tokens().0 + offset) as usize
    }
}

impl std::fmt::Debug for Referee {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Referee")
            .field("next_step", &self.next_step)
            .field("pending", &self.pending.len())
            .finish_non_exhaustive()
    }
}

fn unsigned(column: i32) -> u32 {
    u32::try_from(column).expect("no column of a plan is negative; this is a router bug")
}

fn column(index: usize) -> i32 {
    i32::try_from(index).expect("a step has fewer rows than tokens")
}

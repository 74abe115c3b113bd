//! How many prompt tokens a step may have, so that running streams get their tokens in time.
//!
//! A stream's next token comes when the next step is done, so the gap between two tokens is a
//! step's time, and the prompt tokens beside the decoding rows decide it. [`StepTimeModel`] learns
//! that time; [`Pacer`] turns a target for the gaps into an allowance of each plan.

mod model;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use headrace_core::PromptAllowance;
use headrace_core::ids::Tokens;
use headrace_core::plan::StepPlan;
use headrace_core::scheduler::{Load, Scheduler};

pub(crate) use self::model::{StepShape, StepTimeModel};

/// Prompt tokens of a step beside decoding rows before anything is known of their cost.
const TOKENS_FIRST: u32 = 512;
/// Prompt tokens of a step that are always allowed: with fewer, prompts cost more than their share
/// of products that read every weight, and never end.
const TOKENS_MIN: u32 = 128;
/// A step has at most so many times the prompt tokens that were ever seen in one.
const REACH: u32 = 2;
/// Prompts get at least a quarter of a step: a third of what the rest takes. So a target that the
/// decoding rows alone miss slows prompts down, and does not stop them.
const PROMPT_SHARE: f64 = 1.0 / 3.0;
/// A step aims below the target by so many usual misses of its prediction, but no more than a share.
const MARGIN: f64 = 2.0;
const MARGIN_MAX: f64 = 0.25;

/// The target is for the 99th percentile. Of the one gap in a hundred that may be longer, half is
/// left to mispredictions, and half may be spent on a deep backlog.
const LATE_SHARE: f64 = 0.005;
/// Gaps that may be saved up to be late, and are at the start.
const LATE_MAX: f64 = 1000.0;
/// How much longer than the target such a gap is at most.
const LATE_FACTOR: f64 = 4.0;
/// A backlog is deep when at the target's pace its last prompt would wait longer than this.
const DEEP_US: f64 = 1e6;
/// Tokens after which a backlog is not counted further.
const BACKLOG_ENOUGH: u64 = 1 << 22;

/// What came of a step that is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Paced {
    pub(crate) shape: StepShape,
    /// Microseconds that it was taken to need; `None` while nothing was known, and for steps
    /// without prompt tokens.
    pub(crate) predicted: Option<f64>,
    /// Gaps that ended with it and were longer than the target.
    pub(crate) late: u32,
}

/// Bounds steps by a target for the gaps between the tokens of a stream.
#[derive(Debug)]
pub(crate) struct Pacer {
    /// Microseconds; `None` bounds nothing.
    target: Option<f64>,
    model: StepTimeModel,
    /// Gaps that may be late.
    late_left: f64,
    /// The plans in flight, oldest first.
    in_flight: VecDeque<StepShape>,
}

// === impl Pacer ===

impl Pacer {
    pub(crate) fn new(target: Option<Duration>) -> Self {
        Self {
            target: target.map(|target| target.as_secs_f64() * 1e6),
            model: StepTimeModel::new(),
            late_left: LATE_MAX,
            in_flight: VecDeque::new(),
        }
    }

    /// What the prompt tokens of the next plan may cost, in microseconds.
    pub(crate) fn allowance(&self, scheduler: &Scheduler) -> PromptAllowance {
        match self.target {
            Some(target) => self.allow(target, &scheduler.load(BACKLOG_ENOUGH)),
            None => PromptAllowance::UNLIMITED,
        }
    }

    fn allow(&self, target: f64, load: &Load) -> PromptAllowance {
        if load.decode_rows == 0 {
            return PromptAllowance::UNLIMITED;
        }
        if !self.model.is_known() {
            return PromptAllowance {
                tokens_max: Tokens(TOKENS_FIRST),
                ..PromptAllowance::UNLIMITED
            };
        }
        let [_, per_token, _, per_pair] = self.model.terms();
        let beside = self.model.predict(&StepShape {
            decode_rows: load.decode_rows,
            decode_context: load.decode_context,
            ..StepShape::default()
        });
        let aim = target * (1.0 - (MARGIN * self.model.miss()).min(MARGIN_MAX));
        let mut cost_max = (aim - beside).max(beside * PROMPT_SHARE);

        let tokens = (cost_max / per_token).max(f64::from(TOKENS_MIN));
        let steps = load.backlog as f64 / tokens;
        let deep = steps * target > DEEP_US;
        if deep && self.late_left >= f64::from(load.decode_rows) {
            cost_max = cost_max.max(LATE_FACTOR * aim - beside);
        }
        PromptAllowance {
            cost_max,
            per_token,
            per_pair,
            tokens_max: Tokens(self.model.reach().saturating_mul(REACH).max(TOKENS_FIRST)),
            tokens_min: Tokens(TOKENS_MIN),
        }
    }

    /// A plan was sent.
    pub(crate) fn planned(&mut self, plan: &StepPlan) {
        self.in_flight.push_back(StepShape::of(plan));
    }

    /// The oldest step in flight is done; it took `gap` after the one before it, or after it was
    /// sent.
    ///
    /// # Panics
    /// When no step is in flight.
    pub(crate) fn done(&mut self, gap: Duration) -> Paced {
        let shape = self
            .in_flight
            .pop_front()
            .expect("a result is for a plan in flight; this is a router bug");
        let micros = gap.as_secs_f64() * 1e6;
        let predicted = (shape.prompt_tokens > 0)
            .then(|| self.model.predict(&shape))
            .filter(|&predicted| predicted > 0.0);
        self.model.observe(&shape, micros);
        let late = self.target.is_some_and(|target| micros > target);
        let rows = f64::from(shape.decode_rows);
        let change = if late { -rows } else { rows * LATE_SHARE };
        self.late_left = (self.late_left + change).clamp(0.0, LATE_MAX);
        Paced {
            shape,
            predicted,
            late: if late { shape.decode_rows } else { 0 },
        }
    }

    /// The plans in flight are lost with their group.
    pub(crate) fn lost(&mut self) {
        self.in_flight.clear();
    }

    pub(crate) fn model(&self) -> &StepTimeModel {
        &self.model
    }
}

//! Masks for the rows that wait for one (R7). Matchers live here, each with its sequence; what they
//! compute, a pool computes. The driver hands in tokens and takes out messages.
//!
//! The masks of a step are one message, sent after its plan and before the next: as soon as all are
//! there, or when they have been waited for as long as a step may be held up. A row whose mask is not
//! in the message misses it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use headrace_core::ids::{SeqId, StepId, TokenId};
use headrace_core::scheduler::{MaskedRow, Scheduler};
use headrace_grammar::{MatchError, Matcher, Pool, TokenMask};
use headrace_wire::StepMask;
use prometheus::Histogram;
use rustc_hash::FxHashMap;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Masks that may wait for a thread. A running sequence has one at most; those of ended ones are
/// computed for nobody.
const JOBS_MAX: usize = 4096;

/// The part of the shard's patience after which masks that are there are sent without the others:
/// so that one late mask is not everybody's.
const PATIENCE: f64 = 0.75;

/// What a shard on the CPU calls its device.
const CPU: &str = "cpu";

/// The grammar of an admitted sequence.
#[derive(Debug)]
struct Constraint {
    /// Away while a thread works with it.
    matcher: Option<Box<Matcher>>,
    /// Tokens that came in the meantime.
    tokens: Vec<TokenId>,
    /// The newest mask, and how many tokens it comes after.
    mask: TokenMask,
    after: u32,
}

/// What a thread made.
#[derive(Debug)]
struct Made {
    seq: SeqId,
    matcher: Box<Matcher>,
    took: Duration,
    outcome: Result<TokenMask, MatchError>,
}

/// Where threads leave what they made: one thing a sequence at most.
#[derive(Debug, Default)]
struct MadeBox {
    made: Mutex<Vec<Made>>,
    wake: Notify,
}

/// A step whose plan is sent and whose masks are not.
#[derive(Debug, Clone, Copy)]
struct Awaited {
    step: StepId,
    /// Known once the step before is done: only then can all masks be computed.
    deadline: Option<Instant>,
}

/// The grammars of all admitted sequences.
pub(crate) struct Masks {
    pool: Option<Pool>,
    threads: usize,
    patience: Duration,
    /// On the CPU a launch returns when its work is done, so that the shard's patience begins behind
    /// the forward: then what the step before took is free.
    forward_is_free: bool,
    last_gap: Duration,
    made: Arc<MadeBox>,
    constraints: FxHashMap<SeqId, Constraint>,
    awaited: Option<Awaited>,
    /// Scratch.
    rows: Vec<MaskedRow>,
}

// === impl Masks ===

impl Masks {
    /// Starts nothing yet. `mask_max` is what the shard waits for a step's masks.
    pub(crate) fn new(threads: usize, mask_max: Duration, device: &str) -> Self {
        Self {
            pool: None,
            threads,
            patience: mask_max.mul_f64(PATIENCE),
            forward_is_free: device == CPU,
            last_gap: Duration::ZERO,
            made: Arc::default(),
            constraints: FxHashMap::default(),
            awaited: None,
            rows: Vec::new(),
        }
    }

    /// A sequence was admitted with a grammar.
    pub(crate) fn begin(&mut self, seq: SeqId, matcher: Box<Matcher>) {
        let (mask, after) = (matcher.first_mask(), matcher.accepted());
        let constraint = Constraint {
            matcher: Some(matcher),
            tokens: Vec::new(),
            mask,
            after,
        };
        self.constraints.insert(seq, constraint);
    }

    /// A sequence drew a token; nothing, if it has no grammar. Its next mask is computed.
    pub(crate) fn token(&mut self, seq: SeqId, token: TokenId) {
        if let Some(constraint) = self.constraints.get_mut(&seq) {
            constraint.tokens.push(token);
            self.advance(seq);
        }
    }

    /// A sequence has ended.
    pub(crate) fn end(&mut self, seq: SeqId) {
        let matcher = self.constraints.remove(&seq).and_then(|c| c.matcher);
        if let (Some(matcher), Some(pool)) = (matcher, &self.pool) {
            // A matcher may hold much; where the queue is full, it is given up here.
            pool.submit(move || drop(matcher)).ok();
        }
    }

    /// A plan was sent.
    pub(crate) fn planned(&mut self, scheduler: &Scheduler, step: StepId) {
        if !self.constraints.is_empty() && scheduler.masked_rows(&mut self.rows) {
            let deadline = None;
            self.awaited = Some(Awaited { step, deadline });
            self.arm(scheduler);
        }
    }

    /// A result was committed; the step took so long.
    pub(crate) fn committed(&mut self, scheduler: &Scheduler, step: StepId, gap: Duration) {
        self.last_gap = if self.forward_is_free {
            gap.mul_f64(PATIENCE)
        } else {
            Duration::ZERO
        };
        // The shard did not wait any longer.
        self.awaited.take_if(|awaited| awaited.step == step);
        self.arm(scheduler);
    }

    /// The group is lost, and with it whoever waited for masks.
    pub(crate) fn lost(&mut self) {
        self.awaited = None;
    }

    /// Whether the next plan must wait for the masks of the one before.
    pub(crate) fn are_awaited(&self) -> bool {
        self.awaited.is_some()
    }

    /// When what is there is to be sent.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.awaited.and_then(|awaited| awaited.deadline)
    }

    /// Waits until a thread has made something. Cancel safe: the notice is kept.
    pub(crate) async fn made(&self) {
        self.made.wake.notified().await;
    }

    /// Takes what was made. The sequences whose grammars cannot be followed any further go to `failed`.
    pub(crate) fn collect(&mut self, failed: &mut Vec<SeqId>, times: &Histogram) {
        for Made {
            seq,
            matcher,
            took,
            outcome,
        } in self.made.take()
        {
            times.observe(took.as_secs_f64());
            let Some(constraint) = self.constraints.get_mut(&seq) else {
                continue; // It has ended.
            };
            match outcome {
                Ok(mask) => {
                    constraint.after = matcher.accepted();
                    constraint.mask = mask;
                    constraint.matcher = Some(matcher);
                    if !constraint.tokens.is_empty() {
                        self.advance(seq);
                    }
                }
                Err(error) => {
                    tracing::warn!(seq = seq.0, %error, "a grammar failed");
                    failed.push(seq);
                }
            }
        }
    }

    /// The message of the step that masks are awaited for, if it is to be sent now.
    pub(crate) fn take(&mut self, scheduler: &Scheduler) -> Option<StepMask> {
        let awaited = self.awaited?;
        scheduler.masked_rows(&mut self.rows);
        let is_late = awaited.deadline.is_some_and(|at| at <= Instant::now());
        let ready = |row: &MaskedRow| {
            let constraint = self.constraints.get(&row.seq)?;
            (constraint.after == row.after).then(|| Arc::clone(&constraint.mask.0))
        };
        let mut message = StepMask {
            step: awaited.step,
            ..StepMask::default()
        };
        for row in &self.rows {
            match ready(row) {
                Some(bits) => {
                    message.row.push(row.row);
                    message.bits.push(bits);
                }
                None if is_late => {}
                None => return None,
            }
        }
        self.awaited = None;
        Some(message)
    }

    fn arm(&mut self, scheduler: &Scheduler) {
        if let Some(awaited) = &mut self.awaited
            && scheduler.in_flight() == 1
        {
            awaited.deadline = Some(Instant::now() + self.patience + self.last_gap);
        }
    }

    /// Has a thread take the tokens and make the mask after them, unless one is at it.
    fn advance(&mut self, seq: SeqId) {
        let Some(constraint) = self.constraints.get_mut(&seq) else {
            return;
        };
        let Some(mut matcher) = constraint.matcher.take() else {
            return;
        };
        let tokens = std::mem::take(&mut constraint.tokens);
        let made = Arc::clone(&self.made);
        let pool = &mut self.pool;
        let pool = pool.get_or_insert_with(|| Pool::new("mask", self.threads, JOBS_MAX));
        let queued = pool.submit(move || {
            let begun = std::time::Instant::now();
            let taken = tokens.iter().try_for_each(|token| matcher.accept(token.0));
            let outcome = taken.and_then(|()| matcher.mask());
            made.post(Made {
                seq,
                matcher,
                took: begun.elapsed(),
                outcome,
            });
        });
        if let Err(waiting) = queued {
            // Its matcher is gone: no mask comes, and the sequence ends for that.
            tracing::error!(waiting, "no more masks can be computed at one time");
        }
    }
}

impl fmt::Debug for Masks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masks")
            .field("constraints", &self.constraints.len())
            .field("awaited", &self.awaited)
            .finish_non_exhaustive()
    }
}

// === impl MadeBox ===

impl MadeBox {
    fn post(&self, made: Made) {
        self.made
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(made);
        self.wake.notify_one();
    }

    fn take(&self) -> Vec<Made> {
        std::mem::take(&mut self.made.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

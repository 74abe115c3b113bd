//! What the driver notes of the sequences that are traced: moments and numbers, in order. Spans are
//! made of them elsewhere; here they only get their ids, because a plan tells the shards the span that
//! a row belongs to. A sequence that is not traced costs a branch a step.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use headrace_core::event::{FinishReason, WaitReason};
use headrace_core::ids::StepId;
use headrace_core::plan::{StepPlan, row_flag};
use headrace_core::request::TraceContext;
use rustc_hash::FxHashMap;

/// Chunks of one sequence that are noted one by one; more are counted.
pub const CHUNKS_MAX: usize = 256;

/// Preemptions of one sequence that are noted one by one; more are counted.
pub const SENT_BACK_MAX: usize = 64;

/// W3C's flag of a trace that is sampled.
const SAMPLED: u8 = 1;

/// The spans of one sequence: numbers that are added to its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanOf {
    /// The wait for a place.
    Queued,
    /// From the first step to the last token.
    Infer,
    /// All tokens but the first.
    Decode,
    /// A chunk of known tokens.
    Chunk(usize),
}

/// One traced sequence, shared by the driver and the task that writes its response.
#[derive(Debug)]
pub struct SeqTrace {
    trace_id: [u8; 16],
    base: u64,
    sampled: bool,
    notes: Mutex<SeqNotes>,
}

/// What was noted so far.
#[derive(Debug, Clone, PartialEq)]
pub struct SeqNotes {
    pub submitted: Instant,
    pub started: Option<Started>,
    /// Chunks of known tokens, the first of them [`CHUNKS_MAX`] at most,
    pub chunks: Vec<Chunk>,
    /// and how many there were beside them.
    pub chunks_more: u32,
    pub decode: Option<Decode>,
    /// When it lost its blocks and went back to the queue, [`SENT_BACK_MAX`] times at most,
    pub sent_back: Vec<Instant>,
    /// and how often beside them.
    pub sent_back_more: u32,
    pub first_token: Option<Instant>,
    /// Tokens drawn.
    pub tokens: u32,
    pub finished: Option<(Instant, FinishReason)>,
}

/// It left the queue.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Started {
    pub at: Instant,
    pub waited_for: Option<WaitReason>,
    /// Prompt tokens that came from the prefix cache.
    pub cached: u32,
}

/// A row of known tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chunk {
    pub step: u64,
    pub planned: Instant,
    pub done: Option<Instant>,
    /// Position of its first token.
    pub start: u32,
    pub tokens: u32,
    /// Rows of the step, this one included, and their tokens.
    pub rows: u32,
    pub step_tokens: u32,
    /// Time that the device spent on the step.
    pub device: Duration,
}

/// The rows that take a sequence's last token, together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decode {
    pub planned: Instant,
    /// When the latest of them was done.
    pub done: Option<Instant>,
    pub steps: u32,
    /// Rows of the largest of these steps.
    pub rows_max: u32,
    /// Time that the device spent on these steps.
    pub device: Duration,
}

/// The traced sequences among those that the driver has.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    /// By base.
    live: FxHashMap<u64, Live>,
    /// Plans in flight with rows of such sequences, oldest first.
    flight: VecDeque<Flight>,
}

#[derive(Debug)]
struct Live {
    trace: Arc<SeqTrace>,
    slot: Option<i32>,
}

#[derive(Debug)]
struct Flight {
    step: StepId,
    rows: Vec<(Arc<SeqTrace>, SpanOf)>,
}

// === impl SpanOf ===

impl SpanOf {
    /// Low bits of an id that number the spans of a sequence.
    const BITS: u32 = 12;

    fn number(self) -> u64 {
        match self {
            Self::Queued => 1,
            Self::Infer => 2,
            Self::Decode => 3,
            Self::Chunk(index) => 16 + index as u64,
        }
    }
}

// === impl SeqTrace ===

impl SeqTrace {
    /// `random` makes ids that no other sequence of the trace has.
    pub fn new(trace_id: [u8; 16], sampled: bool, random: u64) -> Self {
        // The highest of the low bits keeps every id from being 0, and the numbers from carrying.
        let base = (random << SpanOf::BITS) | (1 << (SpanOf::BITS - 1));
        Self {
            trace_id,
            base,
            sampled,
            notes: Mutex::new(SeqNotes::new(Instant::now())),
        }
    }

    /// The id of one of its spans.
    pub fn span_id(&self, of: SpanOf) -> u64 {
        self.base + of.number()
    }

    /// What was noted so far.
    pub fn notes(&self) -> SeqNotes {
        self.lock().clone()
    }

    /// What the scheduler carries from the request to its rows: the trace, and the sequence's base.
    pub(crate) fn context(&self) -> TraceContext {
        self.context_of(self.base)
    }

    /// Changes what was noted.
    pub(crate) fn note(&self, change: impl FnOnce(&mut SeqNotes)) {
        change(&mut self.lock());
    }

    fn context_of(&self, span: u64) -> TraceContext {
        let mut context = [0; 25];
        context[..16].copy_from_slice(&self.trace_id);
        context[16..24].copy_from_slice(&span.to_be_bytes());
        context[24] = if self.sampled { SAMPLED } else { 0 };
        context
    }

    fn lock(&self) -> MutexGuard<'_, SeqNotes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl SeqNotes ===

impl SeqNotes {
    /// Of a sequence that was submitted just now.
    pub fn new(submitted: Instant) -> Self {
        Self {
            submitted,
            started: None,
            chunks: Vec::new(),
            chunks_more: 0,
            decode: None,
            sent_back: Vec::new(),
            sent_back_more: 0,
            first_token: None,
            tokens: 0,
            finished: None,
        }
    }

    /// A token was drawn.
    pub(crate) fn token(&mut self) {
        self.first_token.get_or_insert_with(now);
        self.tokens += 1;
    }

    fn chunk(&mut self, chunk: Chunk) -> SpanOf {
        if self.chunks.len() == CHUNKS_MAX {
            self.chunks_more += 1;
            return SpanOf::Infer;
        }
        self.chunks.push(chunk);
        SpanOf::Chunk(self.chunks.len() - 1)
    }

    fn decode(&mut self, planned: Instant, rows: u32) -> SpanOf {
        let decode = self.decode.get_or_insert(Decode {
            planned,
            done: None,
            steps: 0,
            rows_max: 0,
            device: Duration::ZERO,
        });
        decode.steps += 1;
        decode.rows_max = decode.rows_max.max(rows);
        SpanOf::Decode
    }

    fn went_back(&mut self, at: Instant) {
        if self.sent_back.len() == SENT_BACK_MAX {
            self.sent_back_more += 1;
        } else {
            self.sent_back.push(at);
        }
    }

    fn done(&mut self, of: SpanOf, at: Instant, device: Duration) {
        match of {
            SpanOf::Chunk(index) => {
                let chunk = &mut self.chunks[index];
                (chunk.done, chunk.device) = (Some(at), device);
            }
            SpanOf::Decode => {
                if let Some(decode) = &mut self.decode {
                    decode.done = Some(at);
                    decode.device += device;
                }
            }
            SpanOf::Queued | SpanOf::Infer => {}
        }
    }
}

// === impl Traces ===

impl Traces {
    /// A traced sequence was admitted.
    pub(crate) fn admitted(&mut self, trace: Arc<SeqTrace>) {
        self.live.insert(trace.base, Live { trace, slot: None });
    }

    /// Notes the rows of a plan, and has each that is sampled say which span it belongs to. Rows of
    /// the others say nothing to the shards.
    pub(crate) fn planned(&mut self, plan: &mut StepPlan) {
        if self.live.is_empty() {
            return;
        }
        let planned = now();
        if !plan.release_slot.is_empty() {
            self.released(&plan.release_slot, planned);
        }
        let step_tokens = plan.row_len.iter().map(|len| len.unsigned_abs()).sum();
        let rows = u32::try_from(plan.rows()).unwrap_or(u32::MAX);
        let mut touched = Vec::with_capacity(plan.trace_row.len());
        let mut kept = 0;
        for index in 0..plan.trace_row.len() {
            let (row, base) = (plan.trace_row[index], base_of(&plan.trace_context[index]));
            let Some(live) = self.live.get_mut(&base) else {
                continue;
            };
            let place = usize::try_from(row).expect("a row's number is not negative");
            live.slot = Some(plan.row_slot[place]);
            let mut notes = live.trace.lock();
            let of = if plan.row_flags[place] & row_flag::FROM_SLOT == 0 {
                notes.chunk(Chunk {
                    step: plan.step.0,
                    planned,
                    done: None,
                    start: plan.row_start[place].unsigned_abs(),
                    tokens: plan.row_len[place].unsigned_abs(),
                    rows,
                    step_tokens,
                    device: Duration::ZERO,
                })
            } else {
                notes.decode(planned, rows)
            };
            drop(notes);
            touched.push((Arc::clone(&live.trace), of));
            if live.trace.sampled {
                plan.trace_row[kept] = row;
                plan.trace_context[kept] = live.trace.context_of(live.trace.span_id(of));
                kept += 1;
            }
        }
        plan.trace_row.truncate(kept);
        plan.trace_context.truncate(kept);
        if !touched.is_empty() {
            self.flight.push_back(Flight {
                step: plan.step,
                rows: touched,
            });
        }
    }

    /// A step is done.
    pub(crate) fn committed(&mut self, step: StepId, device: Duration) {
        if self.flight.front().is_none_or(|flight| flight.step != step) {
            return;
        }
        let Some(flight) = self.flight.pop_front() else {
            return;
        };
        let at = now();
        for (trace, of) in flight.rows {
            trace.lock().done(of, at, device);
        }
    }

    /// A sequence has ended.
    pub(crate) fn ended(&mut self, trace: &SeqTrace, reason: FinishReason) {
        trace.lock().finished = Some((now(), reason));
        self.live.remove(&trace.base);
    }

    /// The group is lost with everything in flight.
    pub(crate) fn lost(&mut self) {
        self.flight.clear();
    }

    /// Slots that their sequences gave up; one that has not ended was sent back to the queue.
    fn released(&mut self, slots: &[i32], at: Instant) {
        for live in self.live.values_mut() {
            if live.slot.is_some_and(|slot| slots.contains(&slot)) {
                live.slot = None;
                live.trace.lock().went_back(at);
            }
        }
    }
}

// === free functions ===

/// By the runtime's clock, which tests stop.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The sequence that a row's context was made for.
fn base_of(context: &TraceContext) -> u64 {
    let bytes = context[16..24].try_into();
    u64::from_be_bytes(bytes.expect("eight bytes"))
}

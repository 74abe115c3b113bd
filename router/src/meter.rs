//! What one sequence costs, from its request to its end: times, counts, the permit it holds, the
//! line in the log and the observations in the metrics.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use crate::metrics::{Metrics, Served};
use crate::trace::SeqHandle;

/// How a sequence left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Nobody has asked for a token yet.
    Idle,
    /// Tokens are awaited.
    Running,
    /// The end was reported, good or bad.
    Settled,
}

/// The account of one sequence. Dropping it gives the permit back.
#[derive(Debug)]
pub(crate) struct Meter {
    account: Arc<Account>,
    /// The request's, so that its last line is found under it.
    span: tracing::Span,
    /// If the request is traced.
    trace: Option<SeqHandle>,
    _permit: OwnedSemaphorePermit,
    clock: Clock,
    started: Option<Instant>,
    first_token: Option<Instant>,
    outcome: Outcome,
    /// Prompt tokens.
    pub(crate) input: u32,
    /// Prompt tokens that needed no computing.
    pub(crate) cached: u32,
    /// Tokens drawn.
    pub(crate) generated: u32,
    /// The seed, when tokens are drawn with it.
    pub(crate) seed: Option<u64>,
}

/// What the sequences of a request have in common: where they are counted, the line that is logged when the last of them
/// has ended well, and what is told there.
#[derive(Debug)]
pub(crate) struct Account {
    metrics: Arc<Metrics>,
    parameters: GenerateParameters,
    sums: Mutex<Sums>,
}

/// What is added up over the sequences of a request.
#[derive(Debug, Clone, Copy)]
struct Sums {
    /// Sequences that have not ended well yet.
    left: usize,
    input: u64,
    cached: u64,
    generated: u64,
}

/// What was asked for, as TGI's log has it, in its order. Of texts it knows how many: what a client
/// writes stands in no log.
#[derive(Debug, Clone, Copy, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a parameter")]
pub(crate) struct GenerateParameters {
    pub(crate) best_of: Option<usize>,
    pub(crate) temperature: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) top_p: Option<f32>,
    pub(crate) typical_p: Option<f32>,
    pub(crate) do_sample: bool,
    pub(crate) max_new_tokens: Option<u32>,
    pub(crate) stop: Texts,
    pub(crate) truncate: Option<u64>,
    pub(crate) watermark: bool,
    pub(crate) decoder_input_details: bool,
    pub(crate) seed: Option<u64>,
    pub(crate) top_n_tokens: Option<u32>,
    pub(crate) grammar: bool,
}

/// So many texts of a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Texts(pub(crate) usize);

/// Moments that all sequences of a request share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    /// The handler was entered.
    pub(crate) received: Instant,
    /// The sequence was submitted; validation and tokenizing were over.
    pub(crate) submitted: Instant,
}

/// The times TGI reports.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) total: Duration,
    pub(crate) validation: Duration,
    pub(crate) queue: Duration,
    pub(crate) inference: Duration,
    pub(crate) per_token: Duration,
}

// === impl Meter ===

impl Meter {
    pub(crate) fn new(
        account: Arc<Account>,
        permit: OwnedSemaphorePermit,
        clock: Clock,
        (input, seed): (u32, Option<u64>),
        trace: Option<SeqHandle>,
    ) -> Self {
        Self {
            account,
            span: tracing::Span::current(),
            trace,
            _permit: permit,
            clock,
            started: None,
            first_token: None,
            outcome: Outcome::Idle,
            input,
            cached: 0,
            generated: 0,
            seed,
        }
    }

    /// Tokens are awaited from now on: whoever drops the sequence before its end drops a client.
    pub(crate) fn run(&mut self) {
        if self.outcome == Outcome::Idle {
            self.outcome = Outcome::Running;
        }
    }

    /// The sequence left the queue.
    pub(crate) fn start(&mut self, cached: u32) {
        self.started.get_or_insert_with(Instant::now);
        self.cached = cached;
    }

    /// Whether the sequence left the queue.
    pub(crate) fn has_started(&self) -> bool {
        self.started.is_some()
    }

    /// A token was drawn.
    pub(crate) fn token(&mut self) {
        if self.generated == 0 {
            self.first_token = Some(Instant::now());
        }
        self.generated += 1;
    }

    /// The sequence ended well.
    pub(crate) fn succeed(&mut self) -> Times {
        self.outcome = Outcome::Settled;
        let now = Instant::now();
        let times = self.times(now);
        if let Some(trace) = &self.trace {
            trace.succeeded(times, self.seed);
        }
        let first_token = self.first_token.unwrap_or(now);
        self.account.metrics.served(&Served {
            total: times.total,
            validation: times.validation,
            queue: times.queue,
            inference: times.inference,
            first_token: first_token.duration_since(self.clock.received),
            per_token: times.per_token,
            generated: self.generated,
        });
        if let Some(sums) = self.account.settle(self) {
            // Texts, not `?`: TGI's log has them in quotation marks.
            let text = |value: &dyn fmt::Debug| format!("{value:?}");
            tracing::info!(
                parent: &self.span,
                parameters = ?self.account.parameters,
                total_time = text(&times.total),
                validation_time = text(&times.validation),
                queue_time = text(&times.queue),
                inference_time = text(&times.inference),
                time_per_token = text(&times.per_token),
                seed = text(&self.seed),
                input_tokens = sums.input,
                cached_tokens = sums.cached,
                generated_tokens = sums.generated,
                "Success"
            );
        }
        times
    }

    /// The sequence failed for a reason of ours, after its status was sent or before.
    pub(crate) fn fail(&mut self, class: &str, count: Count) {
        self.outcome = Outcome::Settled;
        if let Some(trace) = &self.trace {
            trace.failed(class);
        }
        if count == Count::Here {
            self.account.metrics.failed(class);
        }
    }

    fn times(&self, now: Instant) -> Times {
        let started = self.started.unwrap_or(now);
        let inference = now.duration_since(started);
        Times {
            total: now.duration_since(self.clock.received),
            validation: self.clock.submitted.duration_since(self.clock.received),
            queue: started.duration_since(self.clock.submitted),
            inference,
            per_token: inference / self.generated.max(1),
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.outcome == Outcome::Running {
            self.account.metrics.failed("dropped");
        }
    }
}

// === impl Account ===

impl Account {
    /// Of a request with so many sequences.
    pub(crate) fn new(
        metrics: Arc<Metrics>,
        parameters: GenerateParameters,
        sequences: usize,
    ) -> Self {
        let sums = Sums {
            left: sequences,
            input: 0,
            cached: 0,
            generated: 0,
        };
        Self {
            metrics,
            parameters,
            sums: Mutex::new(sums),
        }
    }

    /// Adds a sequence that ended well; the sums if it was the last.
    fn settle(&self, meter: &Meter) -> Option<Sums> {
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.left = sums.left.saturating_sub(1);
        sums.input += u64::from(meter.input);
        sums.cached += u64::from(meter.cached);
        sums.generated += u64::from(meter.generated);
        (sums.left == 0).then_some(*sums)
    }
}

// === impl Texts ===

impl fmt::Debug for Texts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} texts]", self.0)
    }
}

/// Who counts a failure: a response with an error status is counted by the layer that sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    Here,
    ByStatus,
}

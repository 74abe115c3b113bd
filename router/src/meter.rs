//! What one sequence costs, from its request to its end: times, counts, the permit it holds, the
//! line in the log and the observations in the metrics.

use std::sync::Arc;
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
    metrics: Arc<Metrics>,
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
        metrics: Arc<Metrics>,
        permit: OwnedSemaphorePermit,
        clock: Clock,
        (input, seed): (u32, Option<u64>),
        trace: Option<SeqHandle>,
    ) -> Self {
        Self {
            metrics,
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
        self.metrics.served(&Served {
            total: times.total,
            validation: times.validation,
            queue: times.queue,
            inference: times.inference,
            first_token: first_token.duration_since(self.clock.received),
            per_token: times.per_token,
            generated: self.generated,
        });
        tracing::info!(
            parent: &self.span,
            total_time = ?times.total,
            validation_time = ?times.validation,
            queue_time = ?times.queue,
            inference_time = ?times.inference,
            time_per_token = ?times.per_token,
            seed = ?self.seed,
            input_tokens = self.input,
            cached_tokens = self.cached,
            generated_tokens = self.generated,
            "Success"
        );
        times
    }

    /// The sequence failed for a reason of ours, after its status was sent or before.
    pub(crate) fn fail(&mut self, class: &str, count: Count) {
        self.outcome = Outcome::Settled;
        if let Some(trace) = &self.trace {
            trace.failed(class);
        }
        if count == Count::Here {
            self.metrics.failed(class);
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
            self.metrics.failed("dropped");
        }
    }
}

/// Who counts a failure: a response with an error status is counted by the layer that sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Count {
    Here,
    ByStatus,
}

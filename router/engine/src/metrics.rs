//! The engine's Prometheus series: every name, label and help text.

mod make;
mod series;

use std::time::Duration;

use headrace_core::event::WaitReason;
use headrace_core::scheduler::Stats;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, Registry, linear_buckets};

use self::make::{counter, durations_of, gauge, registered};
pub(crate) use self::series::Method;
use self::series::{
    DeadlineSeries, JoinSeries, MaskSeries, MemorySeries, MethodSeries, PaceSeries, PrefixSeries,
    QueueSeries, StepSeries,
};
use crate::handle::Facts;
use crate::pace::{Paced, StepTimeModel};

/// Sequences that join in one step, by ones.
const NEXT_SIZE_MAX: usize = 1024;

/// All of them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    queue_size: IntGauge,
    batch_size: IntGauge,
    pub(crate) batch_max_tokens: IntGauge,
    pub(crate) next_size: Histogram,
    prefill: MethodSeries,
    decode: MethodSeries,
    joins: JoinSeries,
    queue: QueueSeries,
    kinds: StepSeries,
    prefix: PrefixSeries,
    memory: MemorySeries,
    pub(crate) masks: MaskSeries,
    deadlines: DeadlineSeries,
    pace: PaceSeries,
    inter_token: Histogram,
    pub(crate) groups_lost: IntCounter,
    preemptions: IntCounter,
    cached_tokens: IntCounter,
    prefill_tokens: IntCounter,
    steps: IntCounter,
    tokens: IntCounter,
}

/// How busy the engine is; counts are since its start. All zero until it is ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Sequences that wait for a slot.
    pub waiting: u64,
    /// Sequences that run.
    pub running: u64,
    /// Usable blocks of the KV pool,
    pub kv_blocks: u64,
    /// those that sequences hold,
    pub kv_blocks_used: u64,
    /// and those kept for later requests.
    pub kv_blocks_cached: u64,
    /// Prompt tokens computed.
    pub prefill_tokens: u64,
    /// Prompt tokens taken from the prefix cache.
    pub cached_tokens: u64,
    /// Tokens drawn.
    pub generated_tokens: u64,
}

/// A step that was committed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Committed<'a> {
    pub(crate) method: Method,
    /// From its sending to its result.
    pub(crate) took: Duration,
    /// Since the step before it, or its sending.
    pub(crate) gap: Duration,
    /// Of the device.
    pub(crate) device: Duration,
    /// What the driver took to make tokens of it,
    pub(crate) decode: Duration,
    /// and to hand them out.
    pub(crate) filter: Duration,
    pub(crate) paced: Paced,
    pub(crate) model: &'a StepTimeModel,
    /// Tokens that it might have had.
    pub(crate) tokens_max: u32,
}

// === impl Metrics ===

impl Metrics {
    /// Registers every series.
    pub(crate) fn new(r: &Registry) -> Self {
        let (prefill, decode) = MethodSeries::both(r);
        let sizes = linear_buckets(1.0, 1.0, NEXT_SIZE_MAX).expect("the step is positive");
        let next_size = HistogramOpts::new(
            "tgi_batch_next_size",
            "Sequences that join the batch in one step",
        )
        .buckets(sizes);
        let inter_token = durations_of(
            "headrace_inter_token_duration",
            "Seconds between two tokens of a stream, as its steps make them",
        );
        Self {
            queue_size: gauge(r, "tgi_queue_size", "Sequences waiting for a slot"),
            batch_size: gauge(r, "tgi_batch_current_size", "Sequences running"),
            batch_max_tokens: gauge(
                r,
                "tgi_batch_current_max_tokens",
                "Tokens the running sequences can come to at most",
            ),
            next_size: registered(r, Histogram::with_opts(next_size)),
            prefill,
            decode,
            joins: JoinSeries::new(r),
            queue: QueueSeries::new(r),
            kinds: StepSeries::new(r),
            prefix: PrefixSeries::new(r),
            memory: MemorySeries::new(r),
            masks: MaskSeries::new(r),
            deadlines: DeadlineSeries::new(r),
            pace: PaceSeries::new(r),
            inter_token: registered(r, Histogram::with_opts(inter_token)),
            groups_lost: counter(
                r,
                "headrace_groups_lost",
                "Times that the shards were lost with all they did",
            ),
            preemptions: counter(
                r,
                "headrace_preemptions",
                "Sequences sent back to the queue",
            ),
            cached_tokens: counter(
                r,
                "headrace_cached_tokens",
                "Prompt tokens taken from the prefix cache",
            ),
            prefill_tokens: counter(
                r,
                "headrace_prefill_tokens",
                "Prompt tokens computed, those computed again included",
            ),
            steps: counter(r, "headrace_steps", "Steps committed"),
            tokens: counter(r, "headrace_generated_tokens", "Tokens drawn"),
        }
    }

    /// Shows what is known of the group once it is prepared.
    pub(crate) fn ready(&self, facts: &Facts) {
        self.memory.ready(facts);
    }

    /// Sequences joined a plan that took so long to make; whether others ran already.
    pub(crate) fn joined(&self, took: Duration, others: bool) {
        self.joins.observe(took, others);
    }

    /// A sequence left the queue for the first time.
    pub(crate) fn started(&self, waited: Duration, what_for: Option<WaitReason>, cached: u32) {
        self.queue.of(what_for).observe(waited.as_secs_f64());
        self.prefix.observe(cached);
    }

    /// The time of a sequence was over, before it started or after.
    pub(crate) fn overdue(&self, started: bool) {
        self.deadlines.passed(started);
    }

    /// A step was committed.
    pub(crate) fn committed(&self, step: &Committed<'_>) {
        self.steps.inc();
        self.of(step.method).committed(step);
        self.kinds.observe(step);
        self.pace.observe(step);
        // One gap for each stream, counted without atomics until the end.
        let gaps = self.inter_token.local();
        for _ in 0..step.paced.shape.decode_rows {
            gaps.observe(step.gap.as_secs_f64());
        }
        gaps.flush();
    }

    /// Shows the scheduler's books.
    pub(crate) fn observe(&self, stats: &Stats) {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.queue_size.set(count(stats.waiting));
        self.batch_size.set(count(stats.running));
        self.memory.observe(stats);
        // The scheduler counts for its whole life, which is the engine's.
        let advance = |series: &IntCounter, total: u64| {
            series.inc_by(total.saturating_sub(series.get()));
        };
        advance(&self.preemptions, stats.preemptions);
        advance(&self.masks.missed, stats.masks_missed);
        advance(&self.cached_tokens, stats.cached_tokens);
        advance(&self.prefill_tokens, stats.prefill_tokens);
        advance(&self.tokens, stats.generated_tokens);
    }

    /// What is shown now.
    pub(crate) fn load(&self) -> Load {
        let now = |gauge: &IntGauge| u64::try_from(gauge.get()).unwrap_or(0);
        let [kv_blocks, kv_blocks_used, kv_blocks_cached] = self.memory.blocks().map(now);
        Load {
            waiting: now(&self.queue_size),
            running: now(&self.batch_size),
            kv_blocks,
            kv_blocks_used,
            kv_blocks_cached,
            prefill_tokens: self.prefill_tokens.get(),
            cached_tokens: self.cached_tokens.get(),
            generated_tokens: self.tokens.get(),
        }
    }

    /// The series of a method.
    pub(crate) fn of(&self, method: Method) -> &MethodSeries {
        match method {
            Method::Prefill => &self.prefill,
            Method::Decode => &self.decode,
        }
    }
}

//! Series that belong together, a group each.

use std::time::Duration;

use headrace_core::event::WaitReason;
use headrace_core::scheduler::Stats;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, exponential_buckets, linear_buckets,
};

use super::Committed;
use super::make::{counter, durations_of, gauge, method_counter, method_histogram, registered};
use crate::handle::Facts;

/// What a step was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// It computed prompt tokens, perhaps among others.
    Prefill,
    /// Only single tokens.
    Decode,
}

/// One method's series.
#[derive(Debug, Clone)]
pub(crate) struct MethodSeries {
    pub(crate) count: IntCounter,
    success: IntCounter,
    pub(crate) failure: IntCounter,
    duration: Histogram,
    forward: Histogram,
    decode: Histogram,
    filter: Histogram,
}

/// The device's memory, and who holds the KV pool's blocks.
#[derive(Debug, Clone)]
pub(super) struct MemorySeries {
    plan: IntGaugeVec,
    capacity: IntGauge,
    total: IntGauge,
    used: IntGauge,
    free: IntGauge,
    cached: IntGauge,
}

/// Sequences that join those that run.
#[derive(Debug, Clone)]
pub(super) struct JoinSeries {
    count: IntCounter,
    duration: Histogram,
}

/// What sequences waited for before they started.
#[derive(Debug, Clone)]
pub(super) struct QueueSeries {
    nothing: Histogram,
    slots: Histogram,
    state: Histogram,
    blocks: Histogram,
    budget: Histogram,
    recovery: Histogram,
}

/// Steps as the device sees them, by what is in them.
#[derive(Debug, Clone)]
pub(super) struct StepSeries {
    prefill: Histogram,
    mixed: Histogram,
    decode: Histogram,
    /// Tokens of a step over those that it may have.
    fill: Histogram,
}

/// What the prefix tree is good for.
#[derive(Debug, Clone)]
pub(super) struct PrefixSeries {
    lookups: IntCounter,
    hits: IntCounter,
}

/// What the pace of the steps looks like.
#[derive(Debug, Clone)]
pub(super) struct PaceSeries {
    gaps: IntCounter,
    late: IntCounter,
    /// Prompt tokens of steps in which somebody decoded.
    chunk: Histogram,
    /// Measured over predicted.
    ratio: Histogram,
    /// As [`StepTimeModel::terms`].
    terms: [Gauge; 4],
}

/// What constrained rows wait for (R7).
#[derive(Debug, Clone)]
pub(crate) struct MaskSeries {
    pub(super) missed: IntCounter,
    pub(crate) time: Histogram,
}

/// Sequences whose time was over.
#[derive(Debug, Clone)]
pub(super) struct DeadlineSeries {
    waiting: IntCounter,
    running: IntCounter,
}

// === impl MethodSeries ===

impl MethodSeries {
    /// Those of prefill and of decode.
    pub(super) fn both(r: &Registry) -> (Self, Self) {
        let counts = method_counter(r, "tgi_batch_inference_count", "Steps sent to the shards");
        let successes = method_counter(
            r,
            "tgi_batch_inference_success",
            "Steps whose result was committed",
        );
        let failures = method_counter(
            r,
            "tgi_batch_inference_failure",
            "Steps lost with their shard group",
        );
        let durations = method_histogram(
            r,
            "tgi_batch_inference_duration",
            "Seconds from sending a step to its result",
        );
        let forwards = method_histogram(
            r,
            "tgi_batch_forward_duration",
            "Seconds the device spent on a step",
        );
        let decodes = method_histogram(
            r,
            "tgi_batch_decode_duration",
            "Seconds the router took to make tokens of a step's result",
        );
        let filters = method_histogram(
            r,
            "tgi_batch_filter_duration",
            "Seconds the router took to hand out a step's tokens and to let ended sequences go",
        );
        let of = |label: &str| Self {
            count: counts.with_label_values(&[label]),
            success: successes.with_label_values(&[label]),
            failure: failures.with_label_values(&[label]),
            duration: durations.with_label_values(&[label]),
            forward: forwards.with_label_values(&[label]),
            decode: decodes.with_label_values(&[label]),
            filter: filters.with_label_values(&[label]),
        };
        (of("prefill"), of("decode"))
    }

    pub(super) fn committed(&self, step: &Committed<'_>) {
        self.success.inc();
        self.duration.observe(step.took.as_secs_f64());
        self.forward.observe(step.device.as_secs_f64());
        self.decode.observe(step.decode.as_secs_f64());
        self.filter.observe(step.filter.as_secs_f64());
    }
}

// === impl MemorySeries ===

impl MemorySeries {
    pub(super) fn new(r: &Registry) -> Self {
        let plan = Opts::new(
            "headrace_device_memory_bytes",
            "The memory plan of the first device, by what it is for",
        );
        Self {
            plan: registered(r, IntGaugeVec::new(plan, &["item"])),
            capacity: gauge(
                r,
                "tgi_batch_max_total_tokens",
                "Tokens that the KV pool has room for",
            ),
            total: gauge(
                r,
                "headrace_kv_blocks",
                "Blocks of the KV pool, usable ones",
            ),
            used: gauge(r, "headrace_kv_blocks_used", "Blocks that sequences hold"),
            free: gauge(
                r,
                "headrace_kv_blocks_free",
                "Blocks that no sequence holds, cached ones included",
            ),
            cached: gauge(
                r,
                "headrace_kv_blocks_cached",
                "Blocks kept for later requests, reclaimed when needed",
            ),
        }
    }

    pub(super) fn ready(&self, facts: &Facts) {
        let blocks = facts.limits.blocks_usable();
        self.total.set(blocks.0.into());
        self.free.set(blocks.0.into());
        self.capacity
            .set(facts.limits.block_size.span(blocks).0.into());
        for (item, bytes) in &facts.memory {
            let bytes = i64::try_from(*bytes).unwrap_or(i64::MAX);
            self.plan.with_label_values(&[item]).set(bytes);
        }
    }

    /// Blocks: usable, held by sequences, kept for later.
    pub(super) fn blocks(&self) -> [&IntGauge; 3] {
        [&self.total, &self.used, &self.cached]
    }

    pub(super) fn observe(&self, stats: &Stats) {
        let free = i64::from(stats.blocks_free);
        self.free.set(free);
        self.used.set(self.total.get() - free);
        self.cached.set(stats.blocks_cached.into());
    }
}

// === impl JoinSeries ===

impl JoinSeries {
    pub(super) fn new(r: &Registry) -> Self {
        let reasons = IntCounterVec::new(
            Opts::new(
                "tgi_batch_concat",
                "Steps in which sequences joined others that ran; always for `chunking`, since \
                 prompts are computed beside running sequences",
            ),
            &["reason"],
        );
        let reasons = registered(r, reasons);
        // Dashboards know these, and nothing here holds a sequence back for them.
        for never in ["backpressure", "wait_exceeded"] {
            reasons.with_label_values(&[never]).inc_by(0);
        }
        let durations = method_histogram(
            r,
            "tgi_batch_concat_duration",
            "Seconds the router took to plan a step that sequences joined",
        );
        Self {
            count: reasons.with_label_values(&["chunking"]),
            duration: durations.with_label_values(&["decode"]),
        }
    }

    pub(super) fn observe(&self, took: Duration, others: bool) {
        self.duration.observe(took.as_secs_f64());
        self.count.inc_by(others.into());
    }
}

// === impl QueueSeries ===

impl QueueSeries {
    pub(super) fn new(r: &Registry) -> Self {
        let options = durations_of(
            "headrace_queue_wait_duration",
            "Seconds a sequence waited for its first step, by what it waited for last",
        );
        let waits = registered(r, HistogramVec::new(options, &["reason"]));
        let reason = |name| waits.with_label_values(&[name]);
        Self {
            nothing: reason("none"),
            slots: reason("slots"),
            state: reason("state"),
            blocks: reason("blocks"),
            budget: reason("budget"),
            recovery: reason("recovery"),
        }
    }

    pub(super) fn of(&self, reason: Option<WaitReason>) -> &Histogram {
        match reason {
            None => &self.nothing,
            Some(WaitReason::Slots) => &self.slots,
            Some(WaitReason::State) => &self.state,
            Some(WaitReason::Blocks) => &self.blocks,
            Some(WaitReason::Budget) => &self.budget,
            Some(WaitReason::Recovery) => &self.recovery,
        }
    }
}

// === impl StepSeries ===

impl StepSeries {
    pub(super) fn new(r: &Registry) -> Self {
        let options = durations_of(
            "headrace_step_duration",
            "Seconds the device spent on a step, by whether prompts, streams or both were in it",
        );
        let kinds = registered(r, HistogramVec::new(options, &["kind"]));
        let shares = linear_buckets(0.05, 0.05, 20).expect("the width is positive");
        let fill = HistogramOpts::new(
            "headrace_step_fill_ratio",
            "Tokens of a step over the tokens that it may have",
        );
        Self {
            prefill: kinds.with_label_values(&["prefill"]),
            mixed: kinds.with_label_values(&["mixed"]),
            decode: kinds.with_label_values(&["decode"]),
            fill: registered(r, Histogram::with_opts(fill.buckets(shares))),
        }
    }

    pub(super) fn observe(&self, step: &Committed<'_>) {
        let shape = &step.paced.shape;
        let kind = match (shape.prompt_tokens, shape.decode_rows) {
            (0, _) => &self.decode,
            (_, 0) => &self.prefill,
            (_, _) => &self.mixed,
        };
        kind.observe(step.device.as_secs_f64());
        let tokens = f64::from(shape.prompt_tokens) + f64::from(shape.decode_rows);
        self.fill
            .observe(tokens / f64::from(step.tokens_max.max(1)));
    }
}

// === impl PrefixSeries ===

impl PrefixSeries {
    pub(super) fn new(r: &Registry) -> Self {
        Self {
            lookups: counter(
                r,
                "headrace_prefix_lookups",
                "Prompts that were looked up in the prefix cache",
            ),
            hits: counter(
                r,
                "headrace_prefix_hits",
                "Prompts of which the prefix cache had a part",
            ),
        }
    }

    pub(super) fn observe(&self, cached: u32) {
        self.lookups.inc();
        self.hits.inc_by((cached > 0).into());
    }
}

// === impl MaskSeries ===

impl MaskSeries {
    pub(super) fn new(r: &Registry) -> Self {
        let times = exponential_buckets(1e-6, 2.0, 20).expect("the factor exceeds one");
        let time = HistogramOpts::new(
            "headrace_mask_duration",
            "Seconds that a thread took to follow a grammar by a token and to make the next mask",
        );
        Self {
            missed: counter(
                r,
                "headrace_masks_missed",
                "Masks of constrained tokens that came too late, whose token was drawn again",
            ),
            time: registered(r, Histogram::with_opts(time.buckets(times))),
        }
    }
}

// === impl DeadlineSeries ===

impl DeadlineSeries {
    pub(super) fn new(r: &Registry) -> Self {
        let options = Opts::new(
            "headrace_deadlines_passed",
            "Sequences that ended at their deadline, by whether they waited or ran",
        );
        let passed = registered(r, IntCounterVec::new(options, &["state"]));
        Self {
            waiting: passed.with_label_values(&["waiting"]),
            running: passed.with_label_values(&["running"]),
        }
    }

    pub(super) fn passed(&self, started: bool) {
        let series = if started {
            &self.running
        } else {
            &self.waiting
        };
        series.inc();
    }
}

// === impl PaceSeries ===

impl PaceSeries {
    pub(super) fn new(r: &Registry) -> Self {
        let terms = registered(
            r,
            GaugeVec::new(
                Opts::new(
                    "headrace_step_model_microseconds",
                    "What a step with prompt tokens is taken to cost, by term",
                ),
                &["term"],
            ),
        );
        let term = |name| terms.with_label_values(&[name]);
        let chunks = exponential_buckets(16.0, 2.0, 12).expect("the factor exceeds one");
        let chunk = HistogramOpts::new(
            "headrace_mixed_step_prompt_tokens",
            "Prompt tokens of a step in which sequences decode too",
        );
        let ratios = linear_buckets(0.5, 0.1, 16).expect("the width is positive");
        let ratio = HistogramOpts::new(
            "headrace_step_time_over_prediction",
            "Time of a step with prompt tokens over what was predicted",
        );
        Self {
            gaps: counter(
                r,
                "headrace_token_gaps",
                "Gaps between two tokens of a stream, as its steps make them",
            ),
            late: counter(
                r,
                "headrace_token_gaps_late",
                "Gaps that were longer than --itl-target-ms",
            ),
            chunk: registered(r, Histogram::with_opts(chunk.buckets(chunks))),
            ratio: registered(r, Histogram::with_opts(ratio.buckets(ratios))),
            terms: ["step", "token", "position", "pair"].map(term),
        }
    }

    /// Shows how long a step took, and what was known of it.
    pub(super) fn observe(&self, step: &Committed<'_>) {
        let paced = &step.paced;
        self.gaps.inc_by(paced.shape.decode_rows.into());
        self.late.inc_by(paced.late.into());
        if paced.shape.decode_rows > 0 && paced.shape.prompt_tokens > 0 {
            self.chunk.observe(paced.shape.prompt_tokens.into());
        }
        if let Some(predicted) = paced.predicted {
            self.ratio.observe(step.gap.as_secs_f64() * 1e6 / predicted);
            for (gauge, term) in self.terms.iter().zip(step.model.terms()) {
                gauge.set(term);
            }
        }
    }
}

//! The engine's Prometheus series: every name, label and help text.

use std::time::Duration;

use headrace_core::scheduler::Stats;
use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry, exponential_buckets, linear_buckets,
};

use crate::pace::{Paced, StepTimeModel};

/// Sequences that join in one step, by ones.
const NEXT_SIZE_MAX: usize = 1024;

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
    pub(crate) success: IntCounter,
    pub(crate) failure: IntCounter,
    pub(crate) duration: Histogram,
    pub(crate) forward: Histogram,
}

/// What the pace of the steps looks like.
#[derive(Debug, Clone)]
pub(crate) struct PaceSeries {
    gaps: IntCounter,
    late: IntCounter,
    /// Prompt tokens of steps in which somebody decoded.
    chunk: Histogram,
    /// Measured over predicted.
    ratio: Histogram,
    /// As [`StepTimeModel::terms`].
    terms: [Gauge; 4],
}

/// All of them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) queue_size: IntGauge,
    pub(crate) batch_size: IntGauge,
    pub(crate) batch_max_tokens: IntGauge,
    pub(crate) next_size: Histogram,
    prefill: MethodSeries,
    decode: MethodSeries,
    pub(crate) blocks_total: IntGauge,
    pub(crate) blocks_free: IntGauge,
    pub(crate) blocks_cached: IntGauge,
    pub(crate) preemptions: IntCounter,
    pub(crate) masks: MaskSeries,
    pub(crate) cached_tokens: IntCounter,
    pub(crate) prefill_tokens: IntCounter,
    pub(crate) steps: IntCounter,
    pub(crate) tokens: IntCounter,
    pace: PaceSeries,
}

/// What constrained rows wait for (R7).
#[derive(Debug, Clone)]
pub(crate) struct MaskSeries {
    missed: IntCounter,
    pub(crate) time: Histogram,
}

// === impl Metrics ===

impl Metrics {
    /// Registers every series.
    pub(crate) fn new(r: &Registry) -> Self {
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
        let series = |label: &str| MethodSeries {
            count: counts.with_label_values(&[label]),
            success: successes.with_label_values(&[label]),
            failure: failures.with_label_values(&[label]),
            duration: durations.with_label_values(&[label]),
            forward: forwards.with_label_values(&[label]),
        };
        let sizes = linear_buckets(1.0, 1.0, NEXT_SIZE_MAX).expect("the step is positive");
        let next_size = HistogramOpts::new(
            "tgi_batch_next_size",
            "Sequences that join the batch in one step",
        )
        .buckets(sizes);
        Self {
            queue_size: gauge(r, "tgi_queue_size", "Sequences waiting for a slot"),
            batch_size: gauge(r, "tgi_batch_current_size", "Sequences running"),
            batch_max_tokens: gauge(
                r,
                "tgi_batch_current_max_tokens",
                "Tokens the running sequences can come to at most",
            ),
            next_size: registered(r, Histogram::with_opts(next_size)),
            prefill: series("prefill"),
            decode: series("decode"),
            blocks_total: gauge(
                r,
                "headrace_kv_blocks",
                "Blocks of the KV pool, usable ones",
            ),
            blocks_free: gauge(
                r,
                "headrace_kv_blocks_free",
                "Blocks that no sequence holds, cached ones included",
            ),
            blocks_cached: gauge(
                r,
                "headrace_kv_blocks_cached",
                "Blocks kept for later requests, reclaimed when needed",
            ),
            preemptions: counter(
                r,
                "headrace_preemptions",
                "Sequences sent back to the queue",
            ),
            masks: MaskSeries::new(r),
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
            pace: PaceSeries::new(r),
        }
    }

    /// A step was committed.
    pub(crate) fn step_done(&self, method: Method, took: Duration, device: Duration) {
        let series = self.of(method);
        series.success.inc();
        series.duration.observe(took.as_secs_f64());
        series.forward.observe(device.as_secs_f64());
        self.steps.inc();
    }

    /// Shows how long a step took that was committed, and what was known of it.
    pub(crate) fn paced(&self, paced: &Paced, gap: Duration, model: &StepTimeModel) {
        let series = &self.pace;
        series.gaps.inc_by(paced.shape.decode_rows.into());
        series.late.inc_by(paced.late.into());
        if paced.shape.decode_rows > 0 && paced.shape.prompt_tokens > 0 {
            series.chunk.observe(paced.shape.prompt_tokens.into());
        }
        if let Some(predicted) = paced.predicted {
            series.ratio.observe(gap.as_secs_f64() * 1e6 / predicted);
            for (gauge, term) in series.terms.iter().zip(model.terms()) {
                gauge.set(term);
            }
        }
    }

    /// Shows the scheduler's books.
    pub(crate) fn observe(&self, stats: &Stats) {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.queue_size.set(count(stats.waiting));
        self.batch_size.set(count(stats.running));
        self.blocks_free.set(stats.blocks_free.into());
        self.blocks_cached.set(stats.blocks_cached.into());
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

    /// The series of a method.
    pub(crate) fn of(&self, method: Method) -> &MethodSeries {
        match method {
            Method::Prefill => &self.prefill,
            Method::Decode => &self.decode,
        }
    }
}

// === impl MaskSeries ===

impl MaskSeries {
    fn new(r: &Registry) -> Self {
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

// === impl PaceSeries ===

impl PaceSeries {
    fn new(r: &Registry) -> Self {
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
}

// === making series ===

fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    series: prometheus::Result<C>,
) -> C {
    let series = series.expect("the name and labels are valid; this is a router bug");
    registry
        .register(Box::new(series.clone()))
        .expect("one engine a registry, and no name twice; this is a router bug");
    series
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    registered(registry, IntGauge::new(name, help))
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    registered(registry, IntCounter::new(name, help))
}

fn method_counter(registry: &Registry, name: &str, help: &str) -> IntCounterVec {
    registered(
        registry,
        IntCounterVec::new(Opts::new(name, help), &["method"]),
    )
}

fn method_histogram(registry: &Registry, name: &str, help: &str) -> HistogramVec {
    // 0.15 ms to 145 s in steps of a half: what existing dashboards compute quantiles from.
    let buckets = exponential_buckets(0.0001 * 1.5, 1.5, 35).expect("the factor exceeds one");
    let options = HistogramOpts::new(name, help).buckets(buckets);
    registered(registry, HistogramVec::new(options, &["method"]))
}

//! Names, labels, buckets and help of every series of the HTTP layer. The engine registers its own
//! in the same registry.

use std::sync::OnceLock;
use std::time::Duration;

use headrace_otlp::Counts;
use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

/// Buckets of every series whose name ends in `duration`: 0.15 ms to 146 s, each 1.5 times the last.
const DURATION_BUCKETS: i32 = 35;

/// Steps of the series that count tokens of a request.
const TOKEN_BUCKETS: u32 = 100;

/// The HTTP layer's series.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) count: IntCounter,
    success: IntCounter,
    failure: IntCounterVec,
    rejected: IntCounterVec,
    spans: IntCounterVec,
    duration: Histogram,
    validation: Histogram,
    queue: Histogram,
    inference: Histogram,
    per_token: Histogram,
    first_token: Histogram,
    /// Their buckets depend on the limits, which are known once the model is ready.
    tokens: OnceLock<TokenMetrics>,
}

/// Series with buckets up to a limit.
#[derive(Debug)]
struct TokenMetrics {
    generated: Histogram,
    input: Histogram,
    new_max: Histogram,
    skipped: Histogram,
}

/// What is observed when a sequence has ended well.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Served {
    pub(crate) total: Duration,
    pub(crate) validation: Duration,
    pub(crate) queue: Duration,
    pub(crate) inference: Duration,
    pub(crate) first_token: Duration,
    pub(crate) per_token: Duration,
    pub(crate) generated: u32,
}

// === impl Metrics ===

impl Metrics {
    /// Registers everything that does not depend on the limits.
    pub(crate) fn new(registry: Registry) -> Self {
        let counter = |name: &str, help: &str| register(&registry, IntCounter::new(name, help));
        let duration = |name: &str, help: &str| {
            let buckets = (1..=DURATION_BUCKETS)
                .map(|k| 0.0001 * 1.5_f64.powi(k))
                .collect();
            register(
                &registry,
                Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets)),
            )
        };
        let failure = IntCounterVec::new(
            Opts::new("tgi_request_failure", "Requests that failed, by reason"),
            &["err"],
        );
        let rejected = IntCounterVec::new(
            Opts::new(
                "headrace_requests_rejected",
                "Requests that were answered with an error before they reached the model, by reason",
            ),
            &["reason"],
        );
        let spans = Opts::new(
            "headrace_trace_spans",
            "Spans of traced requests, by what became of them",
        );
        let spans = IntCounterVec::new(spans, &["outcome"]);
        register_build(&registry);
        let process = ProcessCollector::for_self();
        if let Err(error) = registry.register(Box::new(process)) {
            tracing::warn!(%error, "The process is not in the metrics");
        }
        Self {
            rejected: register(&registry, rejected),
            spans: register(&registry, spans),
            count: counter("tgi_request_count", "Requests received"),
            success: counter("tgi_request_success", "Sequences generated to their end"),
            failure: register(&registry, failure),
            duration: duration("tgi_request_duration", "Seconds from request to last token"),
            validation: duration(
                "tgi_request_validation_duration",
                "Seconds spent on validation and tokenization",
            ),
            queue: duration(
                "tgi_request_queue_duration",
                "Seconds spent waiting for the model",
            ),
            inference: duration(
                "tgi_request_inference_duration",
                "Seconds spent in the model",
            ),
            per_token: duration(
                "tgi_request_mean_time_per_token_duration",
                "Seconds in the model divided by generated tokens",
            ),
            first_token: duration(
                "tgi_request_time_to_first_token_duration",
                "Seconds from request to first token",
            ),
            tokens: OnceLock::new(),
            registry,
        }
    }

    /// Registers the series whose buckets end at the limits. The first call counts.
    pub(crate) fn set_limits(&self, input_max: u32, total_max: u32) {
        let linear = |name: &str, help: &str, max: u32| {
            let step = f64::from(max.max(TOKEN_BUCKETS)) / f64::from(TOKEN_BUCKETS);
            let buckets = (1..=TOKEN_BUCKETS).map(|k| step * f64::from(k)).collect();
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets));
            register(&self.registry, histogram)
        };
        self.tokens.get_or_init(|| TokenMetrics {
            generated: linear(
                "tgi_request_generated_tokens",
                "Tokens generated per sequence",
                total_max,
            ),
            input: linear(
                "tgi_request_input_length",
                "Prompt tokens per request",
                input_max,
            ),
            new_max: linear(
                "tgi_request_max_new_tokens",
                "New tokens allowed per request",
                total_max,
            ),
            skipped: linear(
                "tgi_request_skipped_tokens",
                "Tokens that speculation spared a sequence; 0, as nothing speculates",
                total_max,
            ),
        });
    }

    /// A prompt passed validation.
    pub(crate) fn accepted(&self, input_tokens: u32, new_tokens_max: u32) {
        if let Some(tokens) = self.tokens.get() {
            tokens.input.observe(f64::from(input_tokens));
            tokens.new_max.observe(f64::from(new_tokens_max));
        }
    }

    /// A sequence ended well.
    pub(crate) fn served(&self, served: &Served) {
        self.success.inc();
        self.duration.observe(served.total.as_secs_f64());
        self.validation.observe(served.validation.as_secs_f64());
        self.queue.observe(served.queue.as_secs_f64());
        self.inference.observe(served.inference.as_secs_f64());
        self.per_token.observe(served.per_token.as_secs_f64());
        self.first_token.observe(served.first_token.as_secs_f64());
        if let Some(tokens) = self.tokens.get() {
            tokens.generated.observe(f64::from(served.generated));
            tokens.skipped.observe(0.0);
        }
    }

    /// A request failed; `err` is one of `validation`, `overloaded`, `generation`, `incomplete`,
    /// `template`, `deadline`, `dropped`.
    pub(crate) fn failed(&self, err: &str) {
        self.failure.with_label_values(&[err]).inc();
    }

    /// A request was refused; `reason` as [`ApiError::rejection`] gives it.
    ///
    /// [`ApiError::rejection`]: crate::error::ApiError::rejection
    pub(crate) fn rejected(&self, reason: &str) {
        self.rejected.with_label_values(&[reason]).inc();
    }

    /// What became of spans so far.
    pub(crate) fn set_spans(&self, counts: Counts) {
        let outcomes = [
            ("sent", counts.sent),
            ("dropped", counts.dropped),
            ("failed", counts.failed),
        ];
        for (outcome, count) in outcomes {
            let counter = self.spans.with_label_values(&[outcome]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }

    /// Requests received, sequences that ended well, and failures of all kinds.
    pub(crate) fn counts(&self) -> [u64; 3] {
        let failed = self.failure.collect();
        let failed = failed.iter().flat_map(MetricFamily::get_metric);
        let failed: f64 = failed.map(|metric| metric.get_counter().get_value()).sum();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a sum of whole counts"
        )]
        [self.count.get(), self.success.get(), failed as u64]
    }

    /// Everything in the registry, in Prometheus' text format.
    pub(crate) fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "A metric could not be written");
        }
        text
    }
}

// === free functions ===

/// A series that is always 1 and says what is running.
fn register_build(registry: &Registry) {
    let build = IntGaugeVec::new(
        Opts::new("headrace_build_info", "What is running"),
        &["version"],
    );
    register(registry, build)
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
}

fn register<C>(registry: &Registry, collector: prometheus::Result<C>) -> C
where
    C: prometheus::core::Collector + Clone + 'static,
{
    let collector = collector.expect("metric names and labels are constants; this is a router bug");
    registry
        .register(Box::new(collector.clone()))
        .expect("each metric is registered once; this is a router bug");
    collector
}

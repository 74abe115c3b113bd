//! How series are registered: a name, a help text, and buckets for what ends in `duration`.

use prometheus::core::Collector;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    exponential_buckets,
};

pub(super) fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    series: prometheus::Result<C>,
) -> C {
    let series = series.expect("the name and labels are valid; this is a router bug");
    registry
        .register(Box::new(series.clone()))
        .expect("one engine a registry, and no name twice; this is a router bug");
    series
}

pub(super) fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    registered(registry, IntGauge::new(name, help))
}

pub(super) fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    registered(registry, IntCounter::new(name, help))
}

pub(super) fn method_counter(registry: &Registry, name: &str, help: &str) -> IntCounterVec {
    registered(
        registry,
        IntCounterVec::new(Opts::new(name, help), &["method"]),
    )
}

pub(super) fn method_histogram(registry: &Registry, name: &str, help: &str) -> HistogramVec {
    let options = durations_of(name, help);
    registered(registry, HistogramVec::new(options, &["method"]))
}

/// Of a series whose name ends in `duration`: 0.15 ms to 145 s in steps of a half, what existing
/// dashboards compute quantiles from.
pub(super) fn durations_of(name: &str, help: &str) -> HistogramOpts {
    let buckets = exponential_buckets(0.0001 * 1.5, 1.5, 35).expect("the factor exceeds one");
    HistogramOpts::new(name, help).buckets(buckets)
}

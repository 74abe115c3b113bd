//! Figures as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::Load;
use crate::client::{Edge, Wave};
use crate::process::Usage;
use crate::stage::Figures;

/// What one wave comes to.
struct Summary {
    tokens_per_s: f64,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    router_us: f64,
    stub_us: f64,
    client_us: f64,
}

pub(crate) fn json(load: &Load, figures: &[Figures]) -> Value {
    let measurements: Vec<Value> = figures.iter().map(measurement).collect();
    json!({"streams": load.streams, "measurements": measurements})
}

fn measurement(figures: &Figures) -> Value {
    let waves = figures.waves.iter().zip(&figures.after).map(|(wave, after)| {
        let mut value = json!({"streams_failed": wave.failed, "router_rss_mib": mib(*after)});
        if let Some(summary) = Summary::of(wave) {
            value["tokens_per_s"] = summary.tokens_per_s.round().into();
            value["added_latency_ms"] =
                json!({"p50": summary.p50_ms, "p99": summary.p99_ms, "max": summary.max_ms});
            value["cpu_us_per_token"] = json!({
                "router": summary.router_us, "stub": summary.stub_us, "client": summary.client_us,
            });
        }
        value
    });
    json!({
        "tokens_per_stream": figures.tokens,
        "step_ms": figures.step.as_secs_f64() * 1e3,
        "router_rss_idle_mib": mib(figures.idle),
        "waves": waves.collect::<Vec<_>>(),
    })
}

pub(crate) fn table(load: &Load, figures: &[Figures]) -> String {
    let mut out = format!(
        "{} streams; CPU in microseconds a token; RSS is the router's\n\n\
         | step | wave | tokens/s | added p50 | p99 | max | router | stub | client | RSS | failed |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
        load.streams
    );
    for figures in figures {
        let step = if figures.step.is_zero() {
            "at once".into()
        } else {
            format!("{:.1} ms", figures.step.as_secs_f64() * 1e3)
        };
        line(
            &mut out,
            &format!(
                "| {step} | idle | | | | | | | | {:.0} MiB | |",
                mib(figures.idle)
            ),
        );
        for (n, (wave, after)) in figures.waves.iter().zip(&figures.after).enumerate() {
            let (rss, failed) = (mib(*after), wave.failed);
            let middle = Summary::of(wave).map_or_else(
                || "| | | | | | |".into(),
                |s| {
                    format!(
                        "{:.0} | {:.1} ms | {:.1} ms | {:.1} ms | {:.1} | {:.1} | {:.1}",
                        s.tokens_per_s,
                        s.p50_ms,
                        s.p99_ms,
                        s.max_ms,
                        s.router_us,
                        s.stub_us,
                        s.client_us
                    )
                },
            );
            line(
                &mut out,
                &format!(
                    "| {step} | {} | {middle} | {rss:.0} MiB | {failed} |",
                    n + 1
                ),
            );
        }
    }
    out
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{text}").expect("a string takes all that is written to it");
}

fn mib(usage: Usage) -> f64 {
    (usage.rss_bytes as f64 / f64::from(1 << 20) * 10.0).round() / 10.0
}

// === impl Summary ===

impl Summary {
    fn of(wave: &Wave) -> Option<Self> {
        let (begin, end) = wave.edges?;
        let tokens = (end.tokens - begin.tokens) as f64;
        let seconds = (end.at - begin.at).as_secs_f64();
        let mut ages = wave.ages_us.clone();
        ages.sort_unstable();
        let quantile = |percent: usize| {
            let at = ages.len().saturating_sub(1) * percent / 100;
            ages.get(at).map_or(0.0, |&age| f64::from(age) / 1e3)
        };
        let cpu = |of: fn(&Edge) -> Usage| {
            (of(&end).cpu.saturating_sub(of(&begin).cpu)).as_secs_f64() * 1e6 / tokens
        };
        (!ages.is_empty() && seconds > 0.0).then(|| Self {
            tokens_per_s: tokens / seconds,
            p50_ms: quantile(50),
            p99_ms: quantile(99),
            max_ms: quantile(100),
            router_us: cpu(|edge| edge.router),
            stub_us: cpu(|edge| edge.stub),
            client_us: cpu(|edge| edge.client),
        })
    }
}

//! Logs, on stderr.

use std::io::{IsTerminal, stderr};

use headrace_config::Telemetry;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// The level where none is given.
const DEFAULT_LEVEL: &str = "info";

/// TGI's names in filters, and ours.
const TARGETS: [(&str, &str); 2] = [
    ("text_generation_router", "headrace"),
    ("text_generation_launcher", "headrace_launcher"),
];

/// Starts logging for the whole process. Fails when it was started before.
pub(crate) fn start(telemetry: &Telemetry) -> Result<(), TryInitError> {
    let (filter, misread) = filter(&telemetry.log_level);
    let registry = Registry::default().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(stderr);
    if telemetry.json_output {
        registry.with(layer.json().flatten_event(true)).try_init()?;
    } else {
        registry
            .with(layer.with_ansi(stderr().is_terminal()))
            .try_init()?;
    }
    if misread {
        tracing::warn!(
            log_level = telemetry.log_level,
            "The log level is no filter; using info"
        );
    }
    Ok(())
}

// === free functions ===

/// The filter, and whether the text was none. A bare level is for our own crates; others only
/// warn.
fn filter(level: &str) -> (EnvFilter, bool) {
    let level = level.trim();
    let own = |level: &str| EnvFilter::new(format!("warn,headrace={level}"));
    match level.to_ascii_lowercase().as_str() {
        "" => (own(DEFAULT_LEVEL), false),
        bare @ ("error" | "warn" | "info" | "debug" | "trace") => (own(bare), false),
        _ => {
            let mut directives = level.to_owned();
            for (theirs, ours) in TARGETS {
                directives = directives.replace(theirs, ours);
            }
            EnvFilter::try_new(directives)
                .map_or_else(|_| (own(DEFAULT_LEVEL), true), |filter| (filter, false))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::filter;

    #[test]
    fn levels_are_read_as_tgi_reads_them() {
        for (level, directives, misread) in [
            ("", "headrace=info,warn", false),
            ("DEBUG", "headrace=debug,warn", false),
            (
                "info,text_generation_router=debug",
                "headrace=debug,info",
                false,
            ),
            ("a=b=c", "headrace=info,warn", true),
        ] {
            let (filter, refused) = filter(level);
            assert_eq!(
                (filter.to_string().as_str(), refused),
                (directives, misread),
                "{level}"
            );
        }
    }
}

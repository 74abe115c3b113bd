//! What a request asks for beside its body: how long it may take, and whose habits the answers of
//! OpenAI's routes have. Both are decided here, once, as a value.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::request::Parts;
use headrace_config::{Dialect, TIMEOUT_MAX_S};
use tokio::time::Instant;

use crate::app::App;
use crate::error::{ApiError, Invalid};
use crate::openai::habits::Habits;

/// Seconds that a request may take, with a fraction if it likes.
pub(crate) const TIMEOUT_HEADER: &str = "x-request-timeout";

/// Whose habits the answer is to have, `openai` or `tgi`.
pub(crate) const DIALECT_PARAMETER: &str = "dialect";

/// Routes that generate, which read the header.
pub(crate) const GENERATING: [&str; 8] = [
    "/",
    "/generate",
    "/generate_stream",
    "/invocations",
    "/vertex",
    "/v1/chat/completions",
    "/v1/completions",
    "/v2/models/{name}/versions/{version}/infer",
];

/// Those of them that have dialects.
pub(crate) const WITH_DIALECT: [&str; 3] =
    ["/invocations", "/v1/chat/completions", "/v1/completions"];

/// What holds of one request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) deadline: Option<Deadline>,
    pub(crate) habits: &'static Habits,
}

/// When a request that is not answered is not wanted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    /// What it was given, from its arrival on.
    pub(crate) timeout: Timeout,
}

/// Told in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timeout(pub(crate) Duration);

// === impl Terms ===

impl FromRequestParts<Arc<App>> for Terms {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let timeout = match asked_timeout(&parts.headers)? {
            Some(timeout) => Some(timeout),
            None => app.serve.requests.timeout_ms.map(Duration::from_millis),
        };
        let dialect = asked_dialect(parts.uri.query().unwrap_or_default())?;
        Ok(Self {
            deadline: timeout.map(Deadline::after),
            habits: Habits::of(dialect.unwrap_or(app.serve.http.v1_dialect)),
        })
    }
}

// === impl Deadline ===

impl Deadline {
    fn after(timeout: Duration) -> Self {
        Self {
            at: Instant::now() + timeout,
            timeout: Timeout(timeout),
        }
    }
}

// === impl Timeout ===

impl fmt::Display for Timeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s", self.0.as_secs_f64())
    }
}

// === free functions ===

fn asked_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Invalid> {
    let Some(value) = headers.get(TIMEOUT_HEADER) else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default().trim();
    // NaN is in no range, and some numbers above 0 are no nanosecond.
    let timeout = text
        .parse::<f64>()
        .ok()
        .filter(|seconds| *seconds > 0.0 && *seconds <= TIMEOUT_MAX_S as f64)
        .map(Duration::from_secs_f64)
        .filter(|timeout| !timeout.is_zero());
    let given = || String::from_utf8_lossy(value.as_bytes()).into_owned();
    match timeout {
        Some(timeout) => Ok(Some(timeout)),
        None => Err(Invalid::Timeout {
            max: TIMEOUT_MAX_S,
            given: given(),
        }),
    }
}

/// The last value counts.
fn asked_dialect(query: &str) -> Result<Option<Dialect>, Invalid> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let mut values = pairs.filter(|(name, _)| *name == DIALECT_PARAMETER);
    match values.next_back() {
        None => Ok(None),
        Some((_, "openai")) => Ok(Some(Dialect::Openai)),
        Some((_, "tgi")) => Ok(Some(Dialect::Tgi)),
        Some((_, given)) => Err(Invalid::Dialect {
            given: given.to_owned(),
        }),
    }
}

//! Answers that are sent at once: whole sequences, and the headers that tell what they cost.

use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use futures_util::future::join_all;

use crate::app::App;
use crate::error::ApiError;
use crate::meter::{Count, Times};
use crate::respond::{Finish, Piece, Respond};

/// A sequence that ended well.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) respond: Respond,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) finish: Finish,
    pub(crate) times: Times,
}

/// Whether `x-compute-time` is told; TGI leaves it out on `/v1/completions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ComputeTime {
    Told(Instant),
    LeftOut,
}

// === impl Answer ===

impl Answer {
    /// Follows one sequence to its end.
    pub(crate) async fn collect(mut respond: Respond) -> Result<Self, ApiError> {
        let mut pieces = Vec::new();
        loop {
            if let Err(error) = respond.next(&mut pieces).await {
                respond.meter.fail(error.class(), Count::ByStatus);
                tracing::error!(%error, "A request failed");
                return Err(error);
            }
            if let Some(finish) = pieces.last().and_then(|piece| piece.finish) {
                let times = respond.meter.succeed();
                return Ok(Self {
                    respond,
                    pieces,
                    finish,
                    times,
                });
            }
        }
    }

    /// Follows several sequences of one request; the first failure fails all.
    pub(crate) async fn collect_all(responds: Vec<Respond>) -> Result<Vec<Self>, ApiError> {
        join_all(responds.into_iter().map(Self::collect))
            .await
            .into_iter()
            .collect()
    }

    /// The text of OpenAI's routes: what was released of it.
    pub(crate) fn shown_text(&self) -> String {
        let pieces = self.pieces.iter().map(|piece| piece.text.as_str());
        let mut text = pieces.collect();
        self.respond.cut_after_stop(&mut text);
        text
    }

    /// What decides which of several sequences is the best: log-probability per token, so that a
    /// short answer has no advantage.
    pub(crate) fn score(&self) -> f32 {
        let sum: f32 = self.pieces.iter().map(|piece| piece.logprob).sum();
        sum / self.pieces.len().max(1) as f32
    }
}

// === free functions ===

/// The headers of every reply: the device, and the size of the prompt.
pub(crate) fn compute_headers(app: &App, characters: usize) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Ok(kind) = HeaderValue::from_str(&app.compute_type()) {
        headers.insert(HeaderName::from_static("x-compute-type"), kind);
    }
    headers.insert(
        HeaderName::from_static("x-compute-characters"),
        characters.into(),
    );
    headers
}

/// The headers of a reply that is sent at once; the sequences' values are added up.
pub(crate) fn cost_headers(
    app: &App,
    characters: usize,
    answers: &[Answer],
    compute_time: ComputeTime,
) -> HeaderMap {
    let mut headers = compute_headers(app, characters);
    if let ComputeTime::Told(received) = compute_time {
        let seconds = received.elapsed().as_secs_f64().to_string();
        if let Ok(seconds) = HeaderValue::from_str(&seconds) {
            headers.insert(HeaderName::from_static("x-compute-time"), seconds);
        }
    }
    let millis = |time: fn(&Times) -> Duration| -> u64 {
        let sum: Duration = answers.iter().map(|answer| time(&answer.times)).sum();
        u64::try_from(sum.as_millis()).unwrap_or(u64::MAX)
    };
    let tokens = |count: fn(&Respond) -> u32| -> u64 {
        answers
            .iter()
            .map(|answer| u64::from(count(&answer.respond)))
            .sum()
    };
    let values = [
        ("x-total-time", millis(|times| times.total)),
        ("x-validation-time", millis(|times| times.validation)),
        ("x-queue-time", millis(|times| times.queue)),
        ("x-inference-time", millis(|times| times.inference)),
        ("x-time-per-token", millis(|times| times.per_token)),
        ("x-prompt-tokens", tokens(|respond| respond.meter.input)),
        (
            "x-generated-tokens",
            tokens(|respond| respond.meter.generated),
        ),
    ];
    for (name, value) in values {
        headers.insert(HeaderName::from_static(name), value.into());
    }
    headers
}

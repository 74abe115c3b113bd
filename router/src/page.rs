//! `GET /` for a browser: what is served, how busy it is, and a chat to try it by. Out of the
//! binary, in three files that name nobody else's address, so that it works offline.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use headrace_engine::EngineState;
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;

const HTML: &str = include_str!("page/index.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");

/// The page may run its own script, take its own style, and call this server; nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// What a browser asks for when a person opens an address.
const PAGE_TYPE: &str = "text/html";

/// What the server does now. The page asks once a second; beside `/metrics`, whose hundreds of
/// series and buckets it has no use for, this costs a read of each number.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Status {
    /// `loading`, `ready`, `draining` or `down`.
    state: &'static str,
    /// Whether routes that generate want an API key.
    api_key: bool,
    /// Sequences that run.
    running: u64,
    /// Sequences that wait for a slot.
    waiting: u64,
    /// Usable blocks of the KV cache.
    kv_blocks: u64,
    /// Blocks that sequences hold.
    kv_blocks_used: u64,
    /// Blocks kept for later requests, and free for anyone.
    kv_blocks_cached: u64,
    /// Prompt tokens computed since the start.
    prefill_tokens: u64,
    /// Prompt tokens taken from the prefix cache since the start.
    cached_tokens: u64,
    /// Tokens drawn since the start.
    generated_tokens: u64,
    /// Requests received since the start.
    requests: u64,
    /// Sequences that ended well since the start.
    succeeded: u64,
    /// Requests that failed since the start, for whatever reason.
    failed: u64,
}

/// How busy the server is.
#[utoipa::path(
    get, path = "/status", tag = "Headrace",
    responses((status = 200, description = "State, load and counts", body = Status))
)]
pub(crate) async fn status(State(app): State<Arc<App>>) -> Json<Status> {
    let state = match app.backend.state() {
        EngineState::Ready(_) if app.text.get().is_some() => "ready",
        // The shards may be ready before the tokenizer is.
        EngineState::Ready(_) | EngineState::Loading => "loading",
        EngineState::Draining => "draining",
        EngineState::Down { .. } => "down",
    };
    let load = app.backend.load();
    let [requests, succeeded, failed] = app.metrics.counts();
    Json(Status {
        state,
        api_key: app.serve.http.api_key.is_some(),
        running: load.running,
        waiting: load.waiting,
        kv_blocks: load.kv_blocks,
        kv_blocks_used: load.kv_blocks_used,
        kv_blocks_cached: load.kv_blocks_cached,
        prefill_tokens: load.prefill_tokens,
        cached_tokens: load.cached_tokens,
        generated_tokens: load.generated_tokens,
        requests,
        succeeded,
        failed,
    })
}

pub(crate) async fn style() -> Response {
    part("text/css; charset=utf-8", STYLE)
}

pub(crate) async fn script() -> Response {
    part("text/javascript; charset=utf-8", SCRIPT)
}

// === free functions ===

/// The page, under the status that a probe would have got.
pub(crate) fn page(status: StatusCode) -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::VARY, "accept"),
    ];
    (status, headers, part("text/html; charset=utf-8", HTML)).into_response()
}

/// Whether whoever asks would rather have a page than anything else: `text/html` is named, and
/// nothing is as welcome before it or more welcome after it. Probes and programs name `*/*`, JSON
/// or nothing.
pub(crate) fn wants_page(headers: &HeaderMap) -> bool {
    let mut best: (&str, f32) = ("", 0.0);
    let accepted = headers.get_all(header::ACCEPT).iter();
    for range in accepted
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
    {
        let mut parts = range.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let weight = parts.find_map(|part| part.strip_prefix("q="));
        let weight = weight.map_or(1.0, |weight| weight.parse().unwrap_or(0.0));
        if weight > best.1 {
            best = (name, weight);
        }
    }
    best.0.eq_ignore_ascii_case(PAGE_TYPE)
}

fn part(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, text).into_response()
}

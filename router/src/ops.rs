//! Routes for whoever operates the server: probes and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::app::App;
use crate::error::ErrorBody;
use crate::page;

/// Prometheus' text format.
const METRICS_TYPE: &str = "text/plain; version=0.0.4";

/// Whether requests are served. 503 while the model loads and while the server stops.
#[utoipa::path(
    get, path = "/health", tag = "Headrace",
    responses(
        (status = 200, description = "Everything works"),
        (status = 503, description = "Loading, stopping or down", body = ErrorBody),
    )
)]
pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    if app.ready().is_ok() {
        return StatusCode::OK.into_response();
    }
    let body = ErrorBody {
        error: "unhealthy".to_owned(),
        error_type: "healthcheck",
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// Whether this process answers at all; true also while the model loads.
#[utoipa::path(
    get, path = "/livez", tag = "Headrace",
    responses((status = 200, description = "The process lives"))
)]
pub(crate) async fn livez() -> StatusCode {
    StatusCode::OK
}

/// Every series of this process.
#[utoipa::path(
    get, path = "/metrics", tag = "Headrace",
    responses((status = 200, description = "Series", body = String, content_type = "text/plain"))
)]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    if let Some(counts) = app.tracing.counts() {
        app.metrics.set_spans(counts);
    }
    ([(header::CONTENT_TYPE, METRICS_TYPE)], app.metrics.render()).into_response()
}

/// The same as `/health`; for a browser, a page under the same status.
#[utoipa::path(
    get, path = "/", tag = "Headrace",
    responses(
        (status = 200, description = "Everything works"),
        (status = 503, description = "Loading, stopping or down", body = ErrorBody),
    )
)]
pub(crate) async fn health_root(state: State<Arc<App>>, headers: HeaderMap) -> Response {
    let health = health(state).await;
    if page::wants_page(&headers) {
        return page::page(health.status());
    }
    health
}

/// The same as `/health`.
#[utoipa::path(
    get, path = "/ping", tag = "Headrace",
    responses(
        (status = 200, description = "Everything works"),
        (status = 503, description = "Loading, stopping or down", body = ErrorBody),
    )
)]
pub(crate) async fn ping(state: State<Arc<App>>) -> Response {
    health(state).await
}

/// The same as `/health`.
#[utoipa::path(
    get, path = "/readyz", tag = "Headrace",
    responses(
        (status = 200, description = "Everything works"),
        (status = 503, description = "Loading, stopping or down", body = ErrorBody),
    )
)]
pub(crate) async fn readyz(state: State<Arc<App>>) -> Response {
    health(state).await
}

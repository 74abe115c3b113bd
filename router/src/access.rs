//! Who may call: the API key, and browsers of other origins.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::app::App;

const METHODS: HeaderValue = HeaderValue::from_static("GET, POST");
const HEADERS: HeaderValue = HeaderValue::from_static(
    "content-type, authorization, x-request-timeout, x-trace, traceparent, tracestate",
);
const ANY: HeaderValue = HeaderValue::from_static("*");

/// Refuses calls without the API key, where there is one: 401 and an empty body.
pub(crate) async fn authorize(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    match &app.serve.http.api_key {
        Some(key) if !has_key(request.headers(), key) => StatusCode::UNAUTHORIZED.into_response(),
        _ => next.run(request).await,
    }
}

/// Answers preflights and tells browsers which origins may read the answer.
pub(crate) async fn cors(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(origin) = request.headers().get(header::ORIGIN).cloned() else {
        return next.run(request).await;
    };
    let preflight = request.method() == Method::OPTIONS
        && request
            .headers()
            .contains_key(header::ACCESS_CONTROL_REQUEST_METHOD);
    let allowed = allowed_origin(&app.serve.http.cors_allow_origin, &origin);
    let mut response = if preflight {
        StatusCode::OK.into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.append(header::VARY, HeaderValue::from_static("origin"));
    if let Some(allowed) = allowed {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, allowed);
        if preflight {
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, METHODS);
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HEADERS);
        }
    }
    response
}

// === free functions ===

fn has_key(headers: &HeaderMap, key: &str) -> bool {
    let Some(value) = headers.get(header::AUTHORIZATION) else {
        return false;
    };
    let Some((scheme, given)) = value.as_bytes().split_at_checked("Bearer ".len()) else {
        return false;
    };
    scheme.eq_ignore_ascii_case(b"Bearer ") && equal(given, key.as_bytes())
}

/// Compares in time that depends on lengths only.
fn equal(given: &[u8], key: &[u8]) -> bool {
    let different = given.iter().zip(key).fold(0, |bits, (a, b)| bits | (a ^ b));
    given.len() == key.len() && different == 0
}

fn allowed_origin(origins: &[String], origin: &HeaderValue) -> Option<HeaderValue> {
    if origins.is_empty() || origins.iter().any(|allowed| allowed == "*") {
        return Some(ANY);
    }
    origins
        .iter()
        .any(|allowed| allowed.as_bytes() == origin.as_bytes())
        .then(|| origin.clone())
}

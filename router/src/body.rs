//! Request bodies: JSON within a limit, with errors in plain words.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use crate::app::App;
use crate::error::{ApiError, BodyError};

/// Bytes read and thrown away behind a body that is too large, so that a client which writes
/// everything before it reads still sees the answer.
const DISCARD_BYTES_MAX: usize = 64 << 20;

/// Memory a body may claim by its `Content-Length` before a byte of it has come.
const RESERVE_BYTES_MAX: usize = 64 << 10;

/// A request body of type `T`.
#[derive(Debug)]
pub(crate) struct JsonBody<T>(pub(crate) T);

// === impl JsonBody ===

impl<T: DeserializeOwned> FromRequest<Arc<App>> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Self::Rejection> {
        if !is_json(request.headers()) {
            return Err(BodyError::ContentType.into());
        }
        let bytes = read(request, app.serve.requests.payload_limit).await?;
        let Json(value) = Json::from_bytes(&bytes).map_err(BodyError::Json)?;
        Ok(Self(value))
    }
}

// === free functions ===

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
    else {
        return false;
    };
    let essence = value
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    let Some(subtype) = essence.strip_prefix("application/") else {
        return false;
    };
    subtype == "json" || subtype.ends_with("+json")
}

async fn read(request: Request, bytes_max: usize) -> Result<Bytes, BodyError> {
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok())
        .unwrap_or(0);
    let asks_first = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    if announced > bytes_max {
        if !asks_first {
            discard(body).await;
        }
        return Err(BodyError::TooLarge { max: bytes_max });
    }
    let mut bytes = Vec::with_capacity(announced.min(RESERVE_BYTES_MAX));
    let mut stream = body.into_data_stream();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_| BodyError::Interrupted)?;
        if bytes.len() + chunk.len() > bytes_max {
            body = Body::from_stream(stream);
            discard(body).await;
            return Err(BodyError::TooLarge { max: bytes_max });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.into())
}

async fn discard(body: Body) {
    let mut left = DISCARD_BYTES_MAX;
    let mut stream = body.into_data_stream();
    while let Some(Ok(chunk)) = stream.next().await {
        match left.checked_sub(chunk.len()) {
            Some(rest) => left = rest,
            None => return,
        }
    }
}

//! `POST /tokenize` and `/chat_tokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use crate::app::{App, Text};
use crate::body::JsonBody;
use crate::error::{ApiError, Invalid, Unready};
use crate::intake::encode;
use crate::openai::chat::render;
use crate::openai::tools::Tools;
use crate::openai::wire::ChatRequest;
use crate::tgi::wire::{ChatTokenizeResponse, GenerateRequest, SimpleToken};

/// Splits text into tokens. Only `inputs` counts.
#[utoipa::path(
    post, path = "/tokenize", tag = "Headrace", request_body = GenerateRequest,
    responses(
        (status = 200, description = "Tokens", body = Vec<SimpleToken>),
    )
)]
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    JsonBody(body): JsonBody<GenerateRequest>,
) -> Result<Json<Vec<SimpleToken>>, ApiError> {
    if body.inputs.is_empty() {
        return Err(Invalid::Empty { field: "inputs" }.into());
    }
    tokens(loaded(&app)?, body.inputs, true).await.map(Json)
}

/// Renders a chat and splits it into tokens.
#[utoipa::path(
    post, path = "/chat_tokenize", tag = "Headrace", request_body = ChatRequest,
    responses(
        (status = 200, description = "Text and tokens", body = ChatTokenizeResponse),
    )
)]
pub(crate) async fn chat_tokenize(
    State(app): State<Arc<App>>,
    JsonBody(mut body): JsonBody<ChatRequest>,
) -> Result<Json<ChatTokenizeResponse>, ApiError> {
    let text = loaded(&app)?;
    let tools = Tools::take(&mut body).map_err(ApiError::Tool)?;
    let templated_text = render(text, body, tools)?;
    let tokenize_response = tokens(text, templated_text.clone(), false).await?;
    Ok(Json(ChatTokenizeResponse {
        tokenize_response,
        templated_text,
    }))
}

// === free functions ===

fn loaded(app: &App) -> Result<&Text, ApiError> {
    app.text
        .get()
        .map(AsRef::as_ref)
        .ok_or(ApiError::Unhealthy(Unready::Loading))
}

async fn tokens(
    text: &Text,
    input: String,
    add_special_tokens: bool,
) -> Result<Vec<SimpleToken>, ApiError> {
    let encoding = encode(text, input.clone(), add_special_tokens).await?;
    let token = |(id, (start, stop)): (&u32, &(usize, usize))| {
        let (start, stop) = (*start, *stop);
        SimpleToken {
            id: *id,
            text: input.get(start..stop).unwrap_or("").to_owned(),
            start,
            stop,
        }
    };
    Ok(encoding
        .ids
        .iter()
        .zip(&encoding.offsets)
        .map(token)
        .collect())
}

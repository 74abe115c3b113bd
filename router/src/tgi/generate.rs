//! `POST /`, `/generate` and `/generate_stream`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use crate::answer::{Answer, ComputeTime, compute_headers, cost_headers};
use crate::app::App;
use crate::body::JsonBody;
use crate::error::{ApiError, Invalid};
use crate::intake::{Intake, Prompt};
use crate::respond::Manner;
use crate::sse;
use crate::terms::Terms;
use crate::tgi::stream::StreamFrames;
use crate::tgi::wire::{
    BestOfSequence, CompatGenerateRequest, Details, GenerateParameters, GenerateRequest,
    GenerateResponse, PrefillToken, StreamResponse, Token,
};

/// Generates text. With `stream`, as `/generate_stream`.
#[utoipa::path(
    post, path = "/", tag = "Headrace", request_body = CompatGenerateRequest,
    responses(
        (status = 200, description = "Generated text", content(
            (Vec<GenerateResponse> = "application/json"),
            (StreamResponse = "text/event-stream"),
        )),
    )
)]
pub(crate) async fn compat(
    State(app): State<Arc<App>>,
    terms: Terms,
    JsonBody(body): JsonBody<CompatGenerateRequest>,
) -> Result<Response, ApiError> {
    let stream = body.stream.unwrap_or(false);
    let mut parameters = body.parameters.unwrap_or_else(GenerateParameters::absent);
    parameters.return_full_text.get_or_insert(true);
    if stream {
        return streamed(&app, terms, body.inputs, parameters).await;
    }
    let (headers, response) = whole(&app, terms, body.inputs, parameters).await?;
    Ok((headers, Json([response])).into_response())
}

/// Generates text.
#[utoipa::path(
    post, path = "/generate", tag = "Headrace", request_body = GenerateRequest,
    responses(
        (status = 200, description = "Generated text", body = GenerateResponse),
    )
)]
pub(crate) async fn generate(
    State(app): State<Arc<App>>,
    terms: Terms,
    JsonBody(body): JsonBody<GenerateRequest>,
) -> Result<Response, ApiError> {
    let parameters = body.parameters.unwrap_or_else(GenerateParameters::absent);
    let (headers, response) = whole(&app, terms, body.inputs, parameters).await?;
    Ok((headers, Json(response)).into_response())
}

/// Generates text, one event a token.
#[utoipa::path(
    post, path = "/generate_stream", tag = "Headrace", request_body = GenerateRequest,
    responses(
        (status = 200, description = "One event a token", body = StreamResponse,
            content_type = "text/event-stream"),
    )
)]
pub(crate) async fn generate_stream(
    State(app): State<Arc<App>>,
    terms: Terms,
    JsonBody(body): JsonBody<GenerateRequest>,
) -> Result<Response, ApiError> {
    let parameters = body.parameters.unwrap_or_else(GenerateParameters::absent);
    streamed(&app, terms, body.inputs, parameters).await
}

// === free functions ===

/// Headers and answer of a request that is answered at once.
pub(crate) async fn whole(
    app: &Arc<App>,
    terms: Terms,
    inputs: String,
    parameters: GenerateParameters,
) -> Result<(axum::http::HeaderMap, GenerateResponse), ApiError> {
    let received = Instant::now();
    let full_text = parameters.return_full_text.unwrap_or(false);
    let wants_details = parameters.wants_details();
    let characters = inputs.chars().count();
    let prefix = if full_text {
        inputs.clone()
    } else {
        String::new()
    };
    // What `max_best_of` refuses needs no more permits than it allows.
    let sequences = parameters
        .best_of
        .unwrap_or(1)
        .clamp(1, app.serve.requests.max_best_of.max(1));
    let intake = Intake::open(app, terms, Manner::Tgi, sequences, parameters.into_ask())?;
    let best_of = intake.checked.best_of;
    let prompt = Prompt::Text {
        text: inputs,
        add_special_tokens: true,
    };
    let mut answers = Answer::collect_all(intake.submit(vec![prompt], best_of).await?).await?;
    answers.sort_by(|a, b| b.score().total_cmp(&a.score()));
    let headers = cost_headers(app, characters, &answers[..1], ComputeTime::Told(received));
    let mut sequences = answers.iter().map(|answer| sequence(answer, &prefix));
    let best = sequences.next().ok_or(ApiError::Incomplete)?;
    let details = wants_details.then_some(Details {
        finish_reason: best.finish_reason,
        generated_tokens: best.generated_tokens,
        seed: best.seed,
        prefill: best.prefill,
        tokens: best.tokens,
        best_of_sequences: sequences.collect(),
        top_tokens: best.top_tokens,
    });
    Ok((
        headers,
        GenerateResponse {
            generated_text: best.generated_text,
            details,
        },
    ))
}

async fn streamed(
    app: &Arc<App>,
    terms: Terms,
    inputs: String,
    parameters: GenerateParameters,
) -> Result<Response, ApiError> {
    if let Some(given) = parameters.best_of.filter(|best_of| *best_of != 1) {
        return Err(Invalid::BestOfStream { given }.into());
    }
    if parameters.wants_prefill() {
        return Err(Invalid::PrefillDetailsStream.into());
    }
    let prefix = parameters
        .return_full_text
        .unwrap_or(false)
        .then(|| inputs.clone());
    let frames = StreamFrames::new(parameters.wants_details(), prefix);
    let characters = inputs.chars().count();
    let intake = Intake::open(app, terms, Manner::Tgi, 1, parameters.into_ask())?;
    let prompt = Prompt::Text {
        text: inputs,
        add_special_tokens: true,
    };
    let respond = intake
        .submit(vec![prompt], 1)
        .await?
        .pop()
        .ok_or(ApiError::Incomplete)?;
    let headers = compute_headers(app, characters);
    Ok((headers, sse::response(sse::frames(respond, frames))).into_response())
}

fn sequence(answer: &Answer, prefix: &str) -> BestOfSequence {
    let (respond, pieces) = (&answer.respond, &answer.pieces);
    let has_top = pieces.iter().any(|piece| !piece.top.is_empty());
    let alternatives = || {
        pieces
            .iter()
            .map(|piece| respond.text.alternatives(&piece.top))
    };
    BestOfSequence {
        generated_text: format!("{prefix}{}", respond.generated_text()),
        finish_reason: answer.finish.as_tgi(),
        generated_tokens: respond.meter.generated,
        seed: respond.meter.seed,
        prefill: respond
            .prefill()
            .map(|(id, told)| prefill(respond, id, told.logprob))
            .collect(),
        tokens: pieces
            .iter()
            .map(|piece| Token {
                id: piece.id,
                text: piece.text.clone(),
                logprob: piece.logprob,
                special: piece.special,
            })
            .collect(),
        top_tokens: if has_top {
            alternatives().collect()
        } else {
            Vec::new()
        },
    }
}

fn prefill(respond: &crate::respond::Respond, id: u32, logprob: f32) -> PrefillToken {
    PrefillToken {
        id,
        text: respond.text.tokenizer.token_text(id),
        logprob,
    }
}

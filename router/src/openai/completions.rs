//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use serde_json::Map;

use crate::answer::{Answer, ComputeTime, compute_headers, cost_headers};
use crate::app::{App, Text};
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::intake::Intake;
use crate::openai::shared::{Head, failure, joined, sequences};
use crate::openai::wire::{
    Completion, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage,
};
use crate::respond::{Finish, Manner, Piece, Respond};
use crate::sse::{self, Frames, event};
use crate::validate::{Ask, Names};

/// Writes the events of one continuation.
#[derive(Debug)]
struct CompletionFrames {
    head: Arc<Head>,
    index: usize,
    logprobs: bool,
    /// Characters written so far.
    offset: usize,
}

/// Continues one text or several.
#[utoipa::path(
    post, path = "/v1/completions", tag = "Headrace", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The continuation", content(
            (Completion = "application/json"),
            (Completion = "text/event-stream"),
        )),
    )
)]
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    JsonBody(mut body): JsonBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    if body.suffix.is_some() {
        return Err(ApiError::Suffix);
    }
    let ask = Ask {
        tokens_max: body.max_tokens,
        top_n: body.logprobs,
        names: Names {
            prompt: "prompt",
            tokens_max: "max_tokens",
            top_n: "logprobs",
        },
        ..body.ask()
    };
    let characters = body.prompt.characters();
    let prompts = body.prompt.into_prompts();
    let total = sequences(&app, prompts.len(), body.n)?;
    let copies = body.n.unwrap_or(1);
    let head = Head::new(&app, "cmpl", body.model.as_deref());
    let logprobs = body.logprobs.is_some();
    let intake = Intake::open(&app, Manner::Completion, total, ask)?;
    let responds = intake.submit(prompts, copies).await?;
    if body.stream.unwrap_or(false) {
        let headers = compute_headers(&app, characters);
        return Ok((headers, streamed(head, responds, logprobs)).into_response());
    }
    let answers = Answer::collect_all(responds).await?;
    let headers = cost_headers(&app, characters, &answers, ComputeTime::LeftOut);
    Ok((headers, completion(&head, &answers, copies, logprobs)).into_response())
}

// === impl CompletionFrames ===

impl Frames for CompletionFrames {
    fn piece(&mut self, piece: &Piece, respond: &Respond, out: &mut BytesMut) {
        if piece.finish.is_none() && piece.text.is_empty() && !self.logprobs {
            return;
        }
        let pieces = std::slice::from_ref(piece);
        let logprobs = self
            .logprobs
            .then(|| columns(&respond.text, pieces, self.offset));
        self.offset += piece.text.chars().count();
        let choice = CompletionChoice {
            index: self.index,
            text: &piece.text,
            logprobs,
            finish_reason: piece.finish.map_or("", Finish::as_tgi),
        };
        let meter = &respond.meter;
        let usage = piece
            .finish
            .map(|_| Usage::new(meter.input, meter.generated));
        event(&object(&self.head, &[choice], usage), out);
    }

    fn failed(&mut self, error: &ApiError, out: &mut BytesMut) {
        failure(error, out);
    }
}

// === free functions ===

fn streamed(head: Head, responds: Vec<Respond>, logprobs: bool) -> Response {
    let head = Arc::new(head);
    let sequences = responds.into_iter().enumerate().map(|(index, respond)| {
        let head = Arc::clone(&head);
        sse::frames(
            respond,
            CompletionFrames {
                head,
                index,
                logprobs,
                offset: 0,
            },
        )
    });
    sse::response(joined(sequences.collect(), Bytes::new))
}

fn object<'a>(
    head: &'a Head,
    choices: &'a [CompletionChoice<'a>],
    usage: Option<Usage>,
) -> Completion<'a> {
    Completion {
        object: "text_completion",
        id: &head.id,
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.fingerprint,
        choices,
        usage,
    }
}

fn completion(head: &Head, answers: &[Answer], copies: usize, logprobs: bool) -> Response {
    let texts: Vec<String> = answers.iter().map(Answer::shown_text).collect();
    let choices = answers
        .iter()
        .zip(&texts)
        .enumerate()
        .map(|(index, (answer, text))| {
            let pieces = &answer.pieces;
            CompletionChoice {
                index,
                text,
                logprobs: logprobs.then(|| columns(&answer.respond.text, pieces, 0)),
                finish_reason: answer.finish.as_openai(),
            }
        });
    let choices: Vec<_> = choices.collect();
    // A prompt counts once, however many continuations it has.
    let prompt = answers
        .iter()
        .step_by(copies)
        .map(|answer| answer.respond.meter.input)
        .sum();
    let generated = answers
        .iter()
        .map(|answer| answer.respond.meter.generated)
        .sum();
    Json(object(head, &choices, Some(Usage::new(prompt, generated)))).into_response()
}

/// Log-probabilities in OpenAI's columns. `offset` counts characters before the first piece.
fn columns(text: &Text, pieces: &[Piece], offset: usize) -> CompletionLogprobs {
    let mut columns = CompletionLogprobs::default();
    let mut offset = offset;
    for piece in pieces {
        let alternatives = text.alternatives(&piece.top);
        let top: Map<_, _> = alternatives
            .into_iter()
            .map(|token| (token.text, token.logprob.into()))
            .collect();
        columns.tokens.push(text.tokenizer.token_text(piece.id));
        columns.token_logprobs.push(piece.logprob);
        columns.top_logprobs.push(top);
        columns.text_offset.push(offset);
        offset += piece.text.chars().count();
    }
    columns
}

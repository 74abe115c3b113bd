//! `POST /invocations`, as SageMaker calls it; its `GET /ping` is among the probes.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use crate::app::App;
use crate::body::JsonBody;
use crate::error::ApiError;
use crate::openai::wire::{ChatRequest, CompletionRequest};
use crate::terms::Terms;
use crate::tgi::wire::CompatGenerateRequest;
use crate::{openai, tgi};

/// Body of `/`, `/v1/chat/completions` or `/v1/completions`: which, says its prompt's field.
#[derive(Debug)]
pub(crate) enum Invocation {
    /// Has `inputs`.
    Generate(CompatGenerateRequest),
    /// Has `messages`.
    Chat(ChatRequest),
    /// Has `prompt`.
    Completion(CompletionRequest),
}

/// Answer of the route whose body it was, and an event of its stream; only described.
#[derive(Debug)]
pub(crate) struct Invoked;
#[derive(Debug)]
pub(crate) struct InvokedEvent;

/// Does what `/`, `/v1/chat/completions` or `/v1/completions` does with this body.
#[utoipa::path(
    post, path = "/invocations", tag = "Headrace", request_body = Invocation,
    responses(
        (status = 200, description = "What that route answers", content(
            (Invoked = "application/json"),
            (InvokedEvent = "text/event-stream"),
        )),
    )
)]
pub(crate) async fn invocations(
    State(app): State<Arc<App>>,
    terms: Terms,
    JsonBody(body): JsonBody<Invocation>,
) -> Result<Response, ApiError> {
    match body {
        Invocation::Generate(body) => {
            tgi::generate::compat(State(app), terms, JsonBody(body)).await
        }
        Invocation::Chat(body) => openai::chat::chat(State(app), terms, JsonBody(body)).await,
        Invocation::Completion(body) => {
            openai::completions::completions(State(app), terms, JsonBody(body)).await
        }
    }
}

// === impl Invocation ===

impl<'de> Deserialize<'de> for Invocation {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let has = |field: &str| value.get(field).is_some();
        if has("inputs") {
            read(value).map(Self::Generate)
        } else if has("messages") {
            read(value).map(Self::Chat)
        } else if has("prompt") {
            read(value).map(Self::Completion)
        } else {
            Err(D::Error::custom(
                "one of `inputs`, `messages` and `prompt` is needed",
            ))
        }
    }
}

// === impl ToSchema ===

impl PartialSchema for Invocation {
    fn schema() -> RefOr<Schema> {
        one_of(["CompatGenerateRequest", "ChatRequest", "CompletionRequest"].map(named))
    }
}

impl ToSchema for Invocation {}

impl PartialSchema for Invoked {
    fn schema() -> RefOr<Schema> {
        let generated = ArrayBuilder::new().items(named("GenerateResponse")).build();
        one_of([
            Schema::Array(generated).into(),
            named("ChatCompletion"),
            named("Completion"),
        ])
    }
}

impl ToSchema for Invoked {}

impl PartialSchema for InvokedEvent {
    fn schema() -> RefOr<Schema> {
        one_of(["StreamResponse", "ChatChunk", "Completion"].map(named))
    }
}

impl ToSchema for InvokedEvent {}

// === free functions ===

/// A type that the routes of this body's own describe.
fn named(name: &str) -> RefOr<Schema> {
    Ref::from_schema_name(name).into()
}

fn one_of<const N: usize>(schemas: [RefOr<Schema>; N]) -> RefOr<Schema> {
    let all = OneOfBuilder::new();
    let all = schemas.into_iter().fold(all, OneOfBuilder::item);
    Schema::OneOf(all.build()).into()
}

/// The errors are those of the body that was meant.
fn read<T: DeserializeOwned, E: Error>(value: Value) -> Result<T, E> {
    serde_json::from_value(value).map_err(E::custom)
}

//! `POST /vertex`, and `AIP_PREDICT_ROUTE`: predictions of several instances, as Vertex AI calls it.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::answer::{Answer, compute_headers};
use crate::app::App;
use crate::body::JsonBody;
use crate::cloud::check_count;
use crate::error::ApiError;
use crate::openai::chat;
use crate::openai::wire::ChatRequest;
use crate::terms::Terms;
use crate::tgi::generate;
use crate::tgi::wire::{GenerateParameters, GenerateRequest};

pub(crate) const PATH: &str = "/vertex";

/// Body of `/vertex`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct VertexRequest {
    /// What is to be continued or answered, each by itself.
    #[schema(min_items = 1)]
    pub(crate) instances: Vec<Instance>,
}

/// A text with parameters, or a conversation.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "an instance is {\"inputs\": text, \"parameters\": …} or {\"messages\": […], …}"
)]
pub(crate) enum Instance {
    Generate(Box<GenerateRequest>),
    Chat(Box<ChatRequest>),
}

/// Answer of `/vertex`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct VertexResponse {
    /// The new text of each instance, in order.
    pub(crate) predictions: Vec<String>,
}

/// Generates text for each instance. Unless an instance says otherwise, tokens are drawn.
#[utoipa::path(
    post, path = "/vertex", tag = "Headrace", request_body = VertexRequest,
    responses(
        (status = 200, description = "Generated texts", body = VertexResponse),
    )
)]
pub(crate) async fn vertex(
    State(app): State<Arc<App>>,
    terms: Terms,
    JsonBody(body): JsonBody<VertexRequest>,
) -> Result<(HeaderMap, Json<VertexResponse>), ApiError> {
    if body.instances.is_empty() {
        return Err(ApiError::NoInstances);
    }
    check_count(&app, "instances", body.instances.len())?;
    let answers = body
        .instances
        .into_iter()
        .map(|one| one.answer(&app, terms));
    let answers: Vec<(usize, String)> = try_join_all(answers).await?;
    let characters = answers.iter().map(|(characters, _)| characters).sum();
    let predictions = answers.into_iter().map(|(_, text)| text).collect();
    Ok((
        compute_headers(&app, characters),
        Json(VertexResponse { predictions }),
    ))
}

// === impl Instance ===

impl Instance {
    /// Characters of the prompt, and the new text.
    async fn answer(self, app: &Arc<App>, terms: Terms) -> Result<(usize, String), ApiError> {
        match self {
            Self::Generate(body) => {
                let GenerateRequest { inputs, parameters } = *body;
                let mut parameters = parameters.unwrap_or_else(GenerateParameters::absent);
                parameters.do_sample.get_or_insert(true);
                let characters = inputs.chars().count();
                let (_, response) = generate::whole(app, terms, inputs, parameters).await?;
                Ok((characters, response.generated_text))
            }
            Self::Chat(body) => {
                let (characters, answers) = chat::whole(app, terms, *body).await?;
                let text = answers.first().map(Answer::shown_text);
                Ok((characters, text.ok_or(ApiError::Incomplete)?))
            }
        }
    }
}

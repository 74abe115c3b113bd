//! KServe's open inference protocol, version 2: probes, metadata, and `infer` on tensors of text.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use crate::app::App;
use crate::body::JsonBody;
use crate::cloud::check_count;
use crate::error::{ApiError, Invalid};
use crate::terms::Terms;
use crate::tgi::generate;
use crate::tgi::wire::GenerateParameters;

/// The protocol's name of texts.
const BYTES: &str = "BYTES";

/// Body of `infer`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct InferRequest {
    /// Comes back with the answer.
    pub(crate) id: Option<String>,
    /// How every text is to be continued.
    pub(crate) parameters: Option<GenerateParameters>,
    /// Texts to be continued.
    #[schema(min_items = 1)]
    pub(crate) inputs: Vec<InferInput>,
    /// What the answers are to be called: as many as inputs, or none.
    pub(crate) outputs: Option<Vec<InferName>>,
}

/// A tensor of text.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct InferInput {
    #[expect(dead_code, reason = "inputs are known by their order")]
    pub(crate) name: String,
    #[expect(dead_code, reason = "the data has it, too")]
    pub(crate) shape: Option<Vec<u64>>,
    /// `BYTES`.
    pub(crate) datatype: String,
    pub(crate) data: InferData,
}

/// The UTF-8 bytes of one text, or texts.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(
    untagged,
    expecting = "`data` is an array of bytes (0 to 255) or an array of strings"
)]
pub(crate) enum InferData {
    Bytes(Vec<u8>),
    Texts(Vec<String>),
}

/// The name of an answer.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct InferName {
    pub(crate) name: String,
}

/// Answer of `infer`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InferResponse {
    pub(crate) id: String,
    pub(crate) model_name: String,
    pub(crate) outputs: Vec<InferOutput>,
}

/// The answers to an input, in the form that the input had.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct InferOutput {
    pub(crate) name: String,
    pub(crate) shape: [usize; 1],
    pub(crate) datatype: &'static str,
    pub(crate) data: InferData,
}

/// What the server is.
#[utoipa::path(
    get, path = "/v2", tag = "Headrace",
    responses((status = 200, description = "Name, version and extensions"))
)]
pub(crate) async fn server() -> Response {
    let version = env!("CARGO_PKG_VERSION");
    Json(json!({"name": "headrace", "version": version, "extensions": []})).into_response()
}

/// Whether this process answers at all.
#[utoipa::path(
    get, path = "/v2/health/live", tag = "Headrace",
    responses((status = 200, description = "The process lives"))
)]
pub(crate) async fn live() -> Response {
    Json(json!({"live": true})).into_response()
}

/// Whether requests are served.
#[utoipa::path(
    get, path = "/v2/health/ready", tag = "Headrace",
    responses(
        (status = 200, description = "Everything works"),
        (status = 503, description = "Loading, stopping or down"),
    )
)]
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Response {
    readiness(&app)
}

/// What the model takes and gives; whatever it is called, it is the one that is served.
#[utoipa::path(
    get, path = "/v2/models/{name}/versions/{version}", tag = "Headrace",
    params(("name" = String, Path), ("version" = String, Path)),
    responses((status = 200, description = "Name, versions, inputs and outputs"))
)]
pub(crate) async fn model(
    State(app): State<Arc<App>>,
    Path((name, version)): Path<(String, String)>,
) -> Response {
    let text = |name: &str| json!([{"name": name, "datatype": BYTES, "shape": [-1]}]);
    Json(json!({
        "name": name,
        "versions": [version],
        "platform": "headrace",
        "model_id": app.serve.model.id,
        "inputs": text("text_input"),
        "outputs": text("text_output"),
    }))
    .into_response()
}

/// Whether the model is served.
#[utoipa::path(
    get, path = "/v2/models/{name}/versions/{version}/ready", tag = "Headrace",
    params(("name" = String, Path), ("version" = String, Path)),
    responses(
        (status = 200, description = "Everything works"),
        (status = 503, description = "Loading, stopping or down"),
    )
)]
pub(crate) async fn model_ready(State(app): State<Arc<App>>) -> Response {
    readiness(&app)
}

/// Continues every text of every input.
#[utoipa::path(
    post, path = "/v2/models/{name}/versions/{version}/infer", tag = "Headrace",
    params(("name" = String, Path), ("version" = String, Path)),
    request_body = InferRequest,
    responses(
        (status = 200, description = "Generated texts", body = InferResponse),
    )
)]
pub(crate) async fn infer(
    State(app): State<Arc<App>>,
    Path((name, _)): Path<(String, String)>,
    terms: Terms,
    JsonBody(body): JsonBody<InferRequest>,
) -> Result<Json<InferResponse>, ApiError> {
    let names = names(body.inputs.len(), body.outputs)?;
    let parameters = body.parameters.unwrap_or_else(GenerateParameters::absent);
    let asked = body.inputs.into_iter().enumerate();
    let asked = asked.map(|(index, input)| input.texts(index));
    let asked = asked.collect::<Result<Vec<_>, _>>()?;
    let given = asked.iter().map(|(texts, _)| texts.len()).sum();
    if given == 0 {
        return Err(Invalid::Empty { field: "inputs" }.into());
    }
    check_count(&app, "inputs", given)?;
    let outputs = names
        .into_iter()
        .zip(asked)
        .map(async |(name, (texts, in_bytes))| {
            let answers = texts.into_iter().map(|text| {
                let parameters = parameters.clone();
                generate::whole(&app, terms, text, parameters)
            });
            let answers = try_join_all(answers).await?;
            let mut texts = answers.into_iter().map(|(_, answer)| answer.generated_text);
            let data = if in_bytes {
                InferData::Bytes(texts.next().unwrap_or_default().into_bytes())
            } else {
                InferData::Texts(texts.collect())
            };
            Ok::<_, ApiError>(InferOutput {
                name,
                shape: [data.len()],
                datatype: BYTES,
                data,
            })
        });
    Ok(Json(InferResponse {
        id: body.id.unwrap_or_default(),
        model_name: name,
        outputs: try_join_all(outputs).await?,
    }))
}

// === impl InferInput ===

impl InferInput {
    /// The texts, and whether they came as bytes.
    fn texts(self, index: usize) -> Result<(Vec<String>, bool), ApiError> {
        if self.datatype != BYTES {
            let given = self.datatype;
            return Err(ApiError::TensorType { index, given });
        }
        match self.data {
            InferData::Texts(texts) => Ok((texts, false)),
            InferData::Bytes(bytes) => {
                let text = String::from_utf8(bytes).map_err(|_| ApiError::TensorUtf8 { index })?;
                Ok((vec![text], true))
            }
        }
    }
}

// === impl InferData ===

impl InferData {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Texts(texts) => texts.len(),
        }
    }
}

// === free functions ===

fn readiness(app: &App) -> Response {
    let is_ready = app.ready().is_ok();
    let status = if is_ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(json!({"ready": is_ready}))).into_response()
}

/// What the outputs are called.
fn names(inputs: usize, asked: Option<Vec<InferName>>) -> Result<Vec<String>, ApiError> {
    match asked.filter(|asked| !asked.is_empty()) {
        None => Ok((0..inputs).map(|index| format!("output-{index}")).collect()),
        Some(asked) if asked.len() != inputs => Err(ApiError::TensorCount {
            inputs,
            outputs: asked.len(),
        }),
        Some(asked) => Ok(asked.into_iter().map(|output| output.name).collect()),
    }
}

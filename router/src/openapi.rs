//! The description of this API, `GET /api-doc/openapi.json`: made from the handlers and types.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use headrace_config::TIMEOUT_MAX_S;
use serde_json::{Value, json};
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::response::ResponseBuilder;
use utoipa::openapi::{Content, ObjectBuilder, Ref, Required, Type};
use utoipa::{Modify, OpenApi};

use crate::error::ErrorBody;
use crate::terms::{DIALECT_PARAMETER, GENERATING, TIMEOUT_HEADER, WITH_DIALECT};
use crate::{cloud, openai, ops, page, tgi};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Headrace",
        description = "Text generation over HTTP.",
    ),
    paths(
        tgi::generate::compat, tgi::generate::generate, tgi::generate::generate_stream,
        tgi::tokenize::tokenize, tgi::tokenize::chat_tokenize, tgi::info::info,
        openai::chat::chat, openai::completions::completions,
        openai::models::list, openai::models::one,
        cloud::sagemaker::invocations, cloud::vertex::vertex,
        cloud::kserve::server, cloud::kserve::live, cloud::kserve::ready, cloud::kserve::model,
        cloud::kserve::model_ready, cloud::kserve::infer,
        page::status, ops::health, ops::health_root, ops::ping, ops::readyz, ops::livez, ops::metrics,
    ),
    components(schemas(ErrorBody, openai::wire::StreamError)),
    modifiers(&Refusals, &Terms),
)]
struct Document;

/// Where a path says what its events look like.
const STREAM_SCHEMA: &str = "/post/responses/200/content/text~1event-stream/schema";

/// What an event of OpenAI's streams is when generation fails.
const OPENAI_FAILURE: &str = "StreamError";

/// The answers that every route with a body has besides its own.
struct Refusals;

/// What a request asks for beside its body, on every route that generates.
struct Terms;

/// Their status, what it means, and whether the body is an [`ErrorBody`] and may be plain text.
const REFUSALS: [(&str, &str, bool, bool); 10] = [
    ("400", "The body is not JSON", false, true),
    ("401", "The API key is missing or wrong", false, false),
    (
        "413",
        "The body is larger than `payload_limit`",
        false,
        true,
    ),
    ("415", "The content type is not JSON", false, true),
    (
        "422",
        "A field has the wrong type or an impossible value",
        true,
        true,
    ),
    ("424", "Generation failed", true, false),
    ("429", "The model is overloaded", true, false),
    ("500", "Generation did not come to its end", true, false),
    (
        "503",
        "The model is loading or the server is stopping",
        true,
        false,
    ),
    ("504", "The request's deadline passed", true, false),
];

// === impl Refusals ===

impl Modify for Refusals {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let posts = document
            .paths
            .paths
            .values_mut()
            .filter_map(|path| path.post.as_mut());
        posts.for_each(add_refusals);
    }
}

// === impl Terms ===

impl Modify for Terms {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        for (path, item) in &mut document.paths.paths {
            let Some(post) = item.post.as_mut() else {
                continue;
            };
            let mut added = Vec::new();
            if GENERATING.contains(&path.as_str()) {
                added.push(timeout().into());
            }
            if WITH_DIALECT.contains(&path.as_str()) {
                added.push(dialect().into());
            }
            if !added.is_empty() {
                post.parameters.get_or_insert_default().extend(added);
            }
        }
    }
}

// === free functions ===

fn timeout() -> Parameter {
    let seconds = ObjectBuilder::new()
        .schema_type(Type::Number)
        .exclusive_minimum(Some(0.0))
        .maximum(Some(TIMEOUT_MAX_S as f64));
    ParameterBuilder::new()
        .name(TIMEOUT_HEADER)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(
            "Seconds that the request may take, from its arrival to its last token",
        ))
        .schema(Some(seconds))
        .build()
}

fn dialect() -> Parameter {
    let names = ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(["openai", "tgi"]));
    ParameterBuilder::new()
        .name(DIALECT_PARAMETER)
        .parameter_in(ParameterIn::Query)
        .required(Required::False)
        .description(Some(
            "Whose habits the answer has where OpenAI's types and TGI disagree",
        ))
        .schema(Some(names))
        .build()
}

pub(crate) async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], schema()).into_response()
}

/// The description of the API, as OpenAPI 3.1 in JSON.
pub fn schema() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let mut document = serde_json::to_value(Document::openapi())
            .expect("the document is plain data; this is a router bug");
        for (path, item) in document["paths"].as_object_mut().into_iter().flatten() {
            let failures: &[&str] = match path.as_str() {
                "/invocations" => &["ErrorBody", OPENAI_FAILURE],
                path if path.starts_with("/v1/") => &[OPENAI_FAILURE],
                _ => &["ErrorBody"],
            };
            if let Some(schema) = item.pointer_mut(STREAM_SCHEMA) {
                *schema = stream_event(schema.take(), failures);
            }
        }
        document.to_string()
    });
    TEXT.as_str()
}

/// The schema of one event: an object whose `data` is text, as the OpenAPI Initiative describes
/// server-sent events, and the text is JSON. OpenAI's streams end with `[DONE]`.
fn stream_event(payload: Value, failures: &[&str]) -> Value {
    let named = |name: &&str| json!({"$ref": format!("#/components/schemas/{name}")});
    let payloads: Vec<Value> = std::iter::once(payload)
        .chain(failures.iter().map(named))
        .collect();
    let mut data = vec![json!({
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": payloads},
    })];
    if failures.contains(&OPENAI_FAILURE) {
        data.push(json!({"const": "[DONE]"}));
    }
    json!({
        "type": "object",
        "required": ["data"],
        "properties": {"data": {"type": "string", "anyOf": data}},
    })
}

fn add_refusals(operation: &mut Operation) {
    for (status, description, as_json, as_text) in REFUSALS {
        let mut response = ResponseBuilder::new().description(description);
        if as_json {
            let schema = Ref::from_schema_name("ErrorBody");
            response = response.content("application/json", Content::new(Some(schema)));
        }
        if as_text {
            let schema = utoipa::schema!(String).build();
            response = response.content("text/plain", Content::new(Some(schema)));
        }
        operation
            .responses
            .responses
            .insert(status.to_owned(), response.build().into());
    }
}

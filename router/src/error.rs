//! What can go wrong with a request, and the one place that makes a response of it.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use headrace_engine::SubmitError;
use headrace_text::TemplateError;
use serde::Serialize;
use utoipa::ToSchema;

use crate::terms::{TIMEOUT_HEADER, Timeout};

/// Seconds after which a refused client may try again.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// Why a request is answered with anything but what it asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("unhealthy: {0}")]
    Unhealthy(Unready),
    #[error("Model is overloaded: {0}")]
    Overloaded(Overload),
    #[error("Input validation error: {0}")]
    Validation(#[from] Invalid),
    #[error("Template error: {0}")]
    Template(#[from] TemplateError),
    #[error("Template error: the model has no chat template; use `/generate` or `/v1/completions`")]
    NoTemplate,
    #[error("Tool error: {0}")]
    Tool(ToolRefusal),
    #[error("`suffix` is not supported: put the text that follows into the prompt")]
    Suffix,
    #[error(
        "`{field}` asks for {given} sequences; at most {max} (`max_client_batch_size`) are served"
    )]
    BatchSize {
        field: &'static str,
        given: usize,
        max: usize,
    },
    #[error("Input validation error: `instances` cannot be empty")]
    NoInstances,
    #[error("Input validation error: `inputs[{index}].datatype` must be BYTES. Given: {given:?}")]
    TensorType { index: usize, given: String },
    #[error("Input validation error: the bytes of `inputs[{index}].data` are not UTF-8")]
    TensorUtf8 { index: usize },
    #[error(
        "Input validation error: `outputs` must name as many as there are `inputs`. \
         Given: {inputs} `inputs` and {outputs} `outputs`"
    )]
    TensorCount { inputs: usize, outputs: usize },
    #[error("Request failed during generation: {0}")]
    Generation(Fault),
    #[error("Deadline passed: {0}")]
    Deadline(Overdue),
    #[error("Incomplete generation")]
    Incomplete,
    #[error("Incomplete generation stream")]
    IncompleteStream,
    #[error("{0}")]
    Body(#[from] BodyError),
}

/// Why nothing can be generated now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unready {
    #[error("the model is loading")]
    Loading,
    #[error("the server is stopping")]
    Draining,
    #[error("the model's processes are down")]
    Down,
}

/// Which bound is reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Overload {
    #[error("{max} requests (`max_concurrent_requests`) are being served")]
    Requests { max: usize },
    #[error("{waiting} prompts wait to be tokenized; at most {queue_max} may")]
    Encode { waiting: usize, queue_max: usize },
    #[error("{waiting} grammars wait to be compiled; at most {queue_max} may")]
    Grammar { waiting: usize, queue_max: usize },
    #[error("{waiting} sequences wait for the model; at most {queue_max} may")]
    Engine { waiting: usize, queue_max: usize },
}

/// How far a request was when its time was over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Overdue {
    #[error(
        "the request had {timeout} (`{TIMEOUT_HEADER}`), and waited for the model all the while"
    )]
    Waiting { timeout: Timeout },
    #[error(
        "the request had {timeout} (`{TIMEOUT_HEADER}`), in which {generated} tokens were generated"
    )]
    Running { timeout: Timeout, generated: u32 },
}

/// Why tools are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ToolRefusal {
    #[error("`tools` has {given} entries; at most {max} are allowed")]
    Count { given: usize, max: usize },
    #[error("`tools[{index}].function.name` must be a string of 1 to {max} bytes")]
    Name { index: usize, max: usize },
    #[error(
        "`tool_choice` must be \"auto\", \"none\", \"required\", a function's name or \
         {{\"type\": \"function\", \"function\": {{\"name\": …}}}}"
    )]
    Choice,
    #[error("`tool_choice` is \"required\" and `tools` is empty")]
    NothingToCall,
    #[error("`tool_choice` names {name:?}, which is none of `tools`")]
    UnknownFunction { name: String },
    #[error(
        "`tool_choice` asks for a call; this server looks for none (`--tool-call-parser none`)"
    )]
    NoParser,
    #[error("`response_format` and `tools` exclude each other")]
    Format,
}

/// What ended a sequence that should have gone on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    #[error("the model produced a number that is none")]
    Nan,
    #[error("what the grammar allows was not known in time, twice for one token")]
    MaskMissed,
    #[error("the grammar cannot be followed any further within its bounds")]
    GrammarFailed,
    #[error("the model's processes were lost; the request may be sent again")]
    GroupLost,
    #[error("the request was cancelled")]
    Cancelled,
}

/// Why a body is not a request at all. Answered in plain text, as TGI's users know it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("The request body has more than {max} bytes (`payload_limit`)")]
    TooLarge { max: usize },
    #[error("Expected a request with `Content-Type: application/json`")]
    ContentType,
    #[error("The request body could not be read")]
    Interrupted,
    #[error("{0}")]
    Json(#[from] axum::extract::rejection::JsonRejection),
}

/// What a parameter breaks. Each names the field and its limit.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum Invalid {
    #[error("`best_of` must be > 0 and <= {max}. Given: {given}")]
    BestOf { max: usize, given: usize },
    #[error("`best_of` != 1 is not allowed for this endpoint (`max_best_of` is 1). Given: {given}")]
    BestOfDisabled { given: usize },
    #[error("you must use sampling when `best_of` is > 1. Given: {given}")]
    BestOfSampling { given: usize },
    #[error("`seed` must not be set when `best_of` is > 1. Given: {given}")]
    BestOfSeed { given: u64 },
    #[error("`best_of` != 1 is not supported when streaming tokens. Given: {given}")]
    BestOfStream { given: usize },
    #[error("`best_of` must be >= `n`, which is {n}. Given: {given}")]
    BestOfBelow { n: usize, given: usize },
    #[error("`best_of` must be `n`, which is {n}, when streaming tokens. Given: {given}")]
    BestOfStreamed { n: usize, given: usize },
    #[error("`decoder_input_details` == true is not supported when streaming tokens")]
    PrefillDetailsStream,
    #[error("`{field}` must be strictly positive. Given: {given}")]
    NotPositive { field: &'static str, given: f32 },
    #[error("`{field}` must be strictly positive. Given: {given}")]
    NoCount { field: &'static str, given: i64 },
    #[error("`{field}` must be >= {min:?} and <= {max:?}. Given: {given}")]
    Range {
        field: &'static str,
        min: f32,
        max: f32,
        given: f32,
    },
    #[error("`{field}` must be > 0.0 and <= 1.0. Given: {given}")]
    Mass { field: &'static str, given: f32 },
    #[error("`stop` supports up to {max} stop sequences. Given: {given}")]
    StopSequence { max: usize, given: usize },
    #[error("`{field}` must be >= 0 and <= {max}. Given: {given}")]
    TopTokens {
        field: &'static str,
        max: u32,
        given: u32,
    },
    #[error("`{field}` has {given} entries; at most {max} are allowed")]
    TooMany {
        field: &'static str,
        max: usize,
        given: usize,
    },
    #[error("`logit_bias` names the token {given:?}; ids are integers >= 0 and < {vocab_size}")]
    BiasToken { vocab_size: u32, given: String },
    #[error("`{field}` cannot be empty")]
    Empty { field: &'static str },
    #[error("`truncate` must be strictly positive and <= {max}. Given: {given}")]
    Truncate { max: u32, given: u64 },
    #[error(
        "`inputs` tokens + `max_new_tokens` must be <= {max}. \
         Given: {input} `inputs` tokens and {new} `max_new_tokens`"
    )]
    TotalTokens { max: u32, input: u32, new: u32 },
    #[error("`inputs` must have at most {max} tokens. Given: {given}")]
    InputTokens { max: u32, given: u32 },
    #[error("`inputs` holds the token id {id}, outside the vocabulary of {vocab_size}")]
    UnknownToken { id: u32, vocab_size: u32 },
    #[error("`{TIMEOUT_HEADER}` must be seconds > 0 and <= {max}. Given: {given:?}")]
    Timeout { max: u64, given: String },
    #[error("`dialect` must be openai or tgi. Given: {given:?}")]
    Dialect { given: String },
    #[error("tokenizer error: {0}")]
    Tokenizer(String),
    #[error("grammar is not supported")]
    Grammar,
    #[error("grammar is not valid: {0}")]
    GrammarText(String),
    #[error("`messages[{message}].content[{part}]` is {kind:?}; only \"text\" is supported")]
    ContentPart {
        message: usize,
        part: usize,
        kind: String,
    },
}

/// The body of every error of ours, as TGI's clients read it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// What is wrong, beginning with a fixed label per class.
    pub(crate) error: String,
    /// The class.
    pub(crate) error_type: &'static str,
}

/// The labels of a failure, left in the response's extensions for the layer that counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FailureClass {
    /// In `tgi_request_failure`.
    pub(crate) err: &'static str,
    /// In `headrace_requests_rejected`.
    pub(crate) rejection: Option<&'static str>,
}

// === impl ApiError ===

impl ApiError {
    /// The status where none was sent yet.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Unhealthy(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Overloaded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Validation(_)
            | Self::Template(_)
            | Self::NoTemplate
            | Self::Tool(_)
            | Self::Suffix
            | Self::BatchSize { .. }
            | Self::NoInstances
            | Self::TensorType { .. }
            | Self::TensorUtf8 { .. }
            | Self::TensorCount { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Generation(_) => StatusCode::FAILED_DEPENDENCY,
            Self::Deadline(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Incomplete | Self::IncompleteStream => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Body(error) => error.status(),
        }
    }

    /// `error_type` of the body.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Unhealthy(_) => "healthcheck",
            Self::Overloaded(_) => "overloaded",
            Self::Validation(_) | Self::Body(_) | Self::TensorType { .. } => "validation",
            Self::NoInstances => "Input validation error",
            Self::TensorUtf8 { .. } => "utf8",
            Self::TensorCount { .. } => "length mismatch",
            Self::Template(_) | Self::NoTemplate => "template_error",
            Self::Tool(_) => "tool_error",
            Self::Suffix => "suffix not supported",
            Self::BatchSize { .. } => "batch size exceeded",
            Self::Generation(_) => "generation",
            Self::Deadline(_) => "deadline",
            Self::Incomplete => "incomplete_generation",
            Self::IncompleteStream => "incomplete_generation_stream",
        }
    }

    /// `err` of `tgi_request_failure`.
    pub(crate) fn class(&self) -> &'static str {
        match self {
            Self::Unhealthy(_) | Self::Generation(_) => "generation",
            Self::Overloaded(_) => "overloaded",
            Self::Validation(_)
            | Self::Tool(_)
            | Self::Suffix
            | Self::BatchSize { .. }
            | Self::NoInstances
            | Self::TensorType { .. }
            | Self::TensorUtf8 { .. }
            | Self::TensorCount { .. }
            | Self::Body(_) => "validation",
            Self::Template(_) | Self::NoTemplate => "template",
            Self::Deadline(_) => "deadline",
            Self::Incomplete | Self::IncompleteStream => "incomplete",
        }
    }

    /// `reason` of `headrace_requests_rejected`; `None` where a request was taken and failed.
    pub(crate) fn rejection(&self) -> Option<&'static str> {
        match self {
            Self::Unhealthy(Unready::Loading) => Some("loading"),
            Self::Unhealthy(Unready::Draining) => Some("draining"),
            Self::Unhealthy(Unready::Down) => Some("down"),
            Self::Overloaded(Overload::Requests { .. }) => Some("concurrent_requests"),
            Self::Overloaded(Overload::Encode { .. }) => Some("encode_queue"),
            Self::Overloaded(Overload::Grammar { .. }) => Some("grammar_queue"),
            Self::Overloaded(Overload::Engine { .. }) => Some("engine_queue"),
            Self::Validation(_) | Self::Suffix => Some("validation"),
            Self::Template(_) | Self::NoTemplate => Some("template"),
            Self::Tool(_) => Some("tool"),
            Self::BatchSize { .. } => Some("batch_size"),
            Self::NoInstances
            | Self::TensorType { .. }
            | Self::TensorUtf8 { .. }
            | Self::TensorCount { .. } => Some("tensor"),
            Self::Body(BodyError::TooLarge { .. }) => Some("payload"),
            Self::Body(BodyError::ContentType | BodyError::Interrupted | BodyError::Json(_)) => {
                Some("body")
            }
            Self::Deadline(Overdue::Waiting { .. }) => Some("deadline"),
            Self::Deadline(Overdue::Running { .. })
            | Self::Generation(_)
            | Self::Incomplete
            | Self::IncompleteStream => None,
        }
    }

    /// The body, also the payload of the error event in a stream of TGI's routes.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: self.to_string(),
            error_type: self.kind(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        let class = FailureClass {
            err: self.class(),
            rejection: self.rejection(),
        };
        let mut response = if let Self::Body(error) = &self {
            (status, error.to_string()).into_response()
        } else {
            (status, Json(self.body())).into_response()
        };
        if matches!(self, Self::Overloaded(_) | Self::Unhealthy(_)) {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, RETRY_AFTER_S);
        }
        response.extensions_mut().insert(class);
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::NotReady => Self::Unhealthy(Unready::Loading),
            SubmitError::Draining => Self::Unhealthy(Unready::Draining),
            SubmitError::Down { .. } => Self::Unhealthy(Unready::Down),
            SubmitError::QueueFull { waiting, queue_max } => {
                Self::Overloaded(Overload::Engine { waiting, queue_max })
            }
        }
    }
}

// === impl BodyError ===

impl BodyError {
    fn status(&self) -> StatusCode {
        match self {
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::ContentType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Interrupted => StatusCode::BAD_REQUEST,
            Self::Json(rejection) => rejection.status(),
        }
    }
}

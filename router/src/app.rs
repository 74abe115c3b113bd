//! What handlers share, and the table of routes.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use headrace_config::Serve;
use headrace_engine::{EngineState, Facts, TokenId};
use headrace_grammar::Compiler;
use headrace_text::{ChatTemplate, EncodePool, Tokenizer, ToolStyle};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::Instrument;

use crate::backend::Backend;
use crate::error::{ApiError, FailureClass, Overload, Unready};
use crate::metrics::Metrics;
use crate::tgi::wire::Token;
use crate::trace::Tracing;
use crate::validate::random_u64;
use crate::{access, cloud, docs, openai, openapi, ops, page, tgi};

/// One server.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) serve: Serve,
    pub(crate) backend: Backend,
    /// Set when the tokenizer is loaded.
    pub(crate) text: OnceLock<Arc<Text>>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tracing: Tracing,
    permits: Arc<Semaphore>,
}

/// Tokens and text of the model.
#[derive(Debug)]
pub(crate) struct Text {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) tools: ToolStyle,
    pub(crate) pool: EncodePool,
    pub(crate) ending: Vec<TokenId>,
    /// What the tokenizer's files say of the length of a text.
    pub(crate) tokens_max: Option<u32>,
    /// Made by the first request for a grammar.
    pub(crate) grammars: OnceLock<Compiler>,
}

/// Everything a request is measured against; exists once the model can serve.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    pub(crate) text: Arc<Text>,
    pub(crate) facts: Arc<Facts>,
    /// Prompt tokens at most.
    pub(crate) input_max: u32,
    /// Prompt and new tokens at most.
    pub(crate) total_max: u32,
}

// === impl App ===

impl App {
    pub(crate) fn new(serve: Serve, backend: Backend, metrics: Arc<Metrics>) -> Self {
        let permits = serve
            .requests
            .max_concurrent_requests
            .min(Semaphore::MAX_PERMITS);
        let permits = Arc::new(Semaphore::new(permits));
        Self {
            serve,
            backend,
            text: OnceLock::new(),
            metrics,
            tracing: Tracing::off(),
            permits,
        }
    }

    /// The same with traces.
    pub(crate) fn traced(self, tracing: Tracing) -> Self {
        Self { tracing, ..self }
    }

    /// Whether requests can be served, and what by.
    pub(crate) fn ready(&self) -> Result<Ready, ApiError> {
        let facts = match self.backend.state() {
            EngineState::Ready(facts) => facts,
            EngineState::Loading => return Err(ApiError::Unhealthy(Unready::Loading)),
            EngineState::Draining => return Err(ApiError::Unhealthy(Unready::Draining)),
            EngineState::Down { .. } => return Err(ApiError::Unhealthy(Unready::Down)),
        };
        let text = self
            .text
            .get()
            .ok_or(ApiError::Unhealthy(Unready::Loading))?;
        Ok(Ready::new(&self.serve, facts, Arc::clone(text)))
    }

    /// Places for the sequences of one request, all or none, before anything is tokenized.
    pub(crate) fn permit(&self, sequences: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let max = self.serve.requests.max_concurrent_requests;
        let sequences = u32::try_from(sequences).unwrap_or(u32::MAX);
        Arc::clone(&self.permits)
            .try_acquire_many_owned(sequences)
            .map_err(|_| ApiError::Overloaded(Overload::Requests { max }))
    }

    /// `x-compute-type`: how many of which device.
    pub(crate) fn compute_type(&self) -> String {
        if let Some(told) = &self.serve.http.compute_type {
            return told.clone();
        }
        match self.backend.state() {
            EngineState::Ready(facts) => {
                format!("{}-{}", self.serve.shards.len(), facts.describe.device)
            }
            EngineState::Loading | EngineState::Draining | EngineState::Down { .. } => {
                "gpu+optimized".to_owned()
            }
        }
    }

    /// The name a reply calls the model by: what was asked for, unless that was TGI's placeholder.
    pub(crate) fn model_name<'a>(&'a self, asked: Option<&'a str>) -> &'a str {
        asked
            .filter(|name| !name.is_empty() && *name != "tgi")
            .unwrap_or(&self.serve.model.id)
    }
}

// === impl Text ===

impl Text {
    /// Alternatives as TGI tells them.
    pub(crate) fn alternatives(&self, top: &[(TokenId, f32)]) -> Vec<Token> {
        let token = |(id, logprob): &(TokenId, f32)| Token {
            id: id.0,
            text: self.tokenizer.token_text(id.0),
            logprob: *logprob,
            special: self.tokenizer.is_special(id.0),
        };
        top.iter().map(token).collect()
    }
}

// === impl Ready ===

impl Ready {
    pub(crate) fn new(serve: &Serve, facts: Arc<Facts>, text: Arc<Text>) -> Self {
        let asked = &serve.requests;
        let fits = facts.limits.sequence_tokens_max().0;
        // What a file says does not cut a prompt that was asked for.
        let wanted = asked
            .max_input_tokens
            .map_or(0, |max| max.saturating_add(1));
        let told = text.tokens_max.map(|max| max.max(wanted));
        let total_max = asked.max_total_tokens.or(told).unwrap_or(fits).min(fits);
        let room = total_max.saturating_sub(1);
        let input_max = asked.max_input_tokens.map_or(room, |max| max.min(room));
        Self {
            text,
            facts,
            input_max,
            total_max,
        }
    }

    /// A sentence for each limit that was asked for and is more than can be served, and for the
    /// one of the tokenizer's files that is less.
    pub(crate) fn shortfalls(&self, serve: &Serve) -> Vec<String> {
        let asked = &serve.requests;
        let limits = [
            ("--max-total-tokens", asked.max_total_tokens, self.total_max),
            ("--max-input-tokens", asked.max_input_tokens, self.input_max),
        ];
        let too_much = limits.into_iter().filter_map(|(flag, asked, max)| {
            let asked = asked.filter(|asked| *asked > max)?;
            Some(format!(
                "{flag} {asked} is more than the model's context and the KV cache hold: \
                 {max} are served"
            ))
        });
        let fits = self.facts.limits.sequence_tokens_max().0;
        let is_told = asked.max_total_tokens.is_none() && self.total_max < fits;
        let told = self.text.tokens_max.filter(|_| is_told).map(|told| {
            format!(
                "model_max_length of the tokenizer is {told}: {} tokens of a prompt and its \
                 answer are served; --max-total-tokens allows up to {fits}",
                self.total_max
            )
        });
        too_much.chain(told).collect()
    }
}

// === free functions ===

/// Every route. Takes no socket, so that tests can call it.
pub(crate) fn router(app: Arc<App>) -> Router {
    let counted = Router::new()
        .route("/", post(tgi::generate::compat))
        .route("/generate", post(tgi::generate::generate))
        .route("/generate_stream", post(tgi::generate::generate_stream))
        .route("/v1/chat/completions", post(openai::chat::chat))
        .route("/v1/completions", post(openai::completions::completions))
        .route("/invocations", post(cloud::sagemaker::invocations))
        .route(cloud::vertex::PATH, post(cloud::vertex::vertex))
        .route(
            "/v2/models/{name}/versions/{version}/infer",
            post(cloud::kserve::infer),
        )
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), count))
        .route("/tokenize", post(tgi::tokenize::tokenize))
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            access::authorize,
        ));
    let open = Router::new()
        .route("/", get(ops::health_root))
        .route("/health", get(ops::health))
        .route("/ping", get(ops::ping))
        .route("/livez", get(ops::livez))
        .route("/readyz", get(ops::readyz))
        .route("/metrics", get(ops::metrics))
        .route("/status", get(page::status))
        .route("/page/style.css", get(page::style))
        .route("/page/script.js", get(page::script))
        .route("/info", get(tgi::info::info))
        .route("/chat_tokenize", post(tgi::tokenize::chat_tokenize))
        .route("/v1/models", get(openai::models::list))
        .route("/v1/models/{*id}", get(openai::models::one))
        .route("/v2", get(cloud::kserve::server))
        .route("/v2/health/live", get(cloud::kserve::live))
        .route("/v2/health/ready", get(cloud::kserve::ready))
        .route(
            "/v2/models/{name}/versions/{version}",
            get(cloud::kserve::model),
        )
        .route(
            "/v2/models/{name}/versions/{version}/ready",
            get(cloud::kserve::model_ready),
        )
        .route("/docs", get(docs::redirect))
        .route("/docs/", get(docs::index))
        .route("/docs/{*name}", get(docs::file))
        .route("/api-doc/openapi.json", get(openapi::document));
    let routes = Router::new()
        .merge(counted)
        .merge(open)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            access::cors,
        ))
        .with_state(Arc::clone(&app));
    // Around the table of routes, since it changes which of them is taken.
    Router::new()
        .fallback_service(routes)
        .layer(middleware::from_fn_with_state(app, cloud::rename))
}

/// What the metrics' own port serves.
pub(crate) fn metrics_router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(ops::metrics))
        .route("/metrics", get(ops::metrics))
        .with_state(app)
}

/// Counts requests, and those that end with an error before anything is sent. What a request logs
/// is found under its span.
async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    app.metrics.count.inc();
    let path = request.uri().path();
    let trace = app.tracing.begin(&request);
    let span = tracing::info_span!(
        "request",
        path,
        id = format_args!("{:016x}", random_u64()),
        trace_id = trace
            .as_ref()
            .map(|trace| tracing::field::display(trace.id()))
    );
    let answering = next.run(request).instrument(span);
    let response = match trace {
        None => answering.await,
        Some(trace) => {
            let response = Arc::clone(&trace).around(answering).await;
            app.tracing.finish(trace, response).await
        }
    };
    if let Some(class) = response.extensions().get::<FailureClass>() {
        app.metrics.failed(class.err);
        if let Some(reason) = class.rejection {
            app.metrics.rejected(reason);
        }
    }
    response
}

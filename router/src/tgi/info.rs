//! `GET /info`: what is served and within which limits.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use crate::app::App;
use crate::tgi::wire::Info;

/// The name that tools know the router by.
const ROUTER: &str = "text-generation-router";

/// What this server is. Values that are learnt while loading are null until then.
#[utoipa::path(
    get, path = "/info", tag = "Headrace",
    responses((status = 200, description = "The model and its limits", body = Info))
)]
pub(crate) async fn info(State(app): State<Arc<App>>) -> Json<Info> {
    let ready = app.ready().ok();
    let (model, requests, engine) = (&app.serve.model, &app.serve.requests, &app.serve.engine);
    let describe = ready.as_ref().map(|ready| &ready.facts.describe);
    let input_max = ready
        .as_ref()
        .map(|ready| ready.input_max)
        .or(requests.max_input_tokens);
    let total_max = ready
        .as_ref()
        .map(|ready| ready.total_max)
        .or(requests.max_total_tokens);
    Json(Info {
        model_id: model.id.clone(),
        model_sha: model.sha.clone(),
        model_pipeline_tag: Some("text-generation".to_owned()),
        max_concurrent_requests: requests.max_concurrent_requests,
        max_best_of: requests.max_best_of,
        max_stop_sequences: requests.max_stop_sequences,
        max_input_tokens: input_max,
        max_total_tokens: total_max,
        validation_workers: requests.validation_workers,
        max_client_batch_size: requests.max_client_batch_size,
        router: ROUTER,
        version: env!("CARGO_PKG_VERSION"),
        sha: option_env!("HEADRACE_GIT_SHA"),
        docker_label: option_env!("HEADRACE_DOCKER_LABEL"),
        model_dtype: describe.map(|describe| describe.dtype.clone()),
        kv_cache_dtype: describe.map(|describe| match app.serve.device.kv_dtype.as_str() {
            "" => describe.dtype.clone(),
            told => told.to_owned(),
        }),
        model_device_type: describe.map(|describe| describe.device.clone()),
        max_input_length: input_max,
        max_batch_prefill_tokens: engine.prefill_tokens_max,
        max_batch_total_tokens: ready.as_ref().map(|ready| {
            let limits = &ready.facts.limits;
            limits.block_size.span(limits.blocks_usable()).0
        }),
        waiting_served_ratio: 0.0,
        max_waiting_tokens: 0,
        max_batch_size: Some(engine.running_max),
    })
}

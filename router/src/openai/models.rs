//! `GET /v1/models` and `/v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use crate::app::App;
use crate::openai::wire::{Model, Models};

/// The models that are served: one.
#[utoipa::path(
    get, path = "/v1/models", tag = "Headrace",
    responses((status = 200, description = "The models", body = Models))
)]
pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<Models> {
    Json(Models {
        object: "list",
        data: vec![model(&app)],
    })
}

/// A model by its name.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "Headrace",
    params(("id" = String, Path, description = "Its name; it may contain slashes")),
    responses(
        (status = 200, description = "The model", body = Model),
        (status = 404, description = "No such model"),
    )
)]
pub(crate) async fn one(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Model>, StatusCode> {
    let model = model(&app);
    if model.id == id {
        Ok(Json(model))
    } else {
        Err(StatusCode::NOT_FOUND)
    }
}

// === free functions ===

fn model(app: &App) -> Model {
    let id = app.serve.model.id.clone();
    Model {
        object: "model",
        created: 0,
        owned_by: id.clone(),
        id,
    }
}

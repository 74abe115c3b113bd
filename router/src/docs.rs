//! `GET /docs`: Swagger's page about this API, out of the binary, so that it works offline.

use std::sync::{Arc, LazyLock};

use axum::extract::Path;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use utoipa_swagger_ui::{Config, serve};

/// Relative to the page, so that a proxy may put both under a path of its own.
const DOCUMENT: &str = "../api-doc/openapi.json";

/// The page's own address ends with a slash: it names its parts by relative paths.
pub(crate) async fn redirect() -> Redirect {
    Redirect::permanent("docs/")
}

pub(crate) async fn index() -> Response {
    part("index.html")
}

pub(crate) async fn file(Path(name): Path<String>) -> Response {
    part(&name)
}

// === free functions ===

fn part(name: &str) -> Response {
    static CONFIG: LazyLock<Arc<Config<'static>>> =
        LazyLock::new(|| Arc::new(Config::from(DOCUMENT)));
    match serve(name, Arc::clone(&CONFIG)) {
        Ok(Some(file)) => (
            [(header::CONTENT_TYPE, file.content_type)],
            file.bytes.into_owned(),
        )
            .into_response(),
        Ok(None) | Err(_) => StatusCode::NOT_FOUND.into_response(),
    }
}

//! Routes that clouds call by convention: SageMaker, Vertex AI, KServe. Each turns its own bodies
//! into the requests of TGI's and OpenAI's routes and does nothing else.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{Method, Uri, uri::PathAndQuery};
use axum::middleware::Next;
use axum::response::Response;

use crate::app::App;
use crate::error::Invalid;

pub(crate) mod kserve;
pub(crate) mod sagemaker;
pub(crate) mod vertex;

/// Calls of the routes that Vertex AI names in `AIP_PREDICT_ROUTE` and `AIP_HEALTH_ROUTE` become
/// calls of ours, whatever else those paths serve.
pub(crate) async fn rename(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let http = &app.serve.http;
    let path = Some(request.uri().path());
    let own = match *request.method() {
        Method::POST if path == http.predict_route.as_deref() => Some(vertex::PATH),
        Method::GET if path == http.health_route.as_deref() => Some("/health"),
        _ => None,
    };
    if let Some(own) = own {
        *request.uri_mut() = Uri::from(PathAndQuery::from_static(own));
    }
    next.run(request).await
}

/// Refuses a call that asks for more sequences than the server ever has permits for.
fn check_count(app: &App, field: &'static str, given: usize) -> Result<(), Invalid> {
    let max = app.serve.requests.max_concurrent_requests;
    if given > max {
        return Err(Invalid::TooMany { field, max, given });
    }
    Ok(())
}

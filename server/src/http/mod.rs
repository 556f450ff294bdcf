//! The public port.

mod answer;
mod body;
mod chat;
mod completions;
pub mod connection;
mod events;
mod generate;
mod openapi;
mod probes;

use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, Uri};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};

use crate::app::App;
use crate::openai::error::ApiError;
use crate::openai::{Model, ModelList};
pub use body::read as read_body;
use connection::Accepted;

/// Everything on the public port.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/health", get(probes::health))
        .route("/ready", get(probes::ready))
        .route("/live", get(probes::live))
        .route("/metrics", get(probes::metrics))
        .route("/openapi.json", get(openapi::openapi_json))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_route)
        .layer(middleware::from_fn_with_state(app.clone(), count))
        .with_state(app)
}

pub async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

pub async fn unknown_route(method: Method, uri: Uri) -> ApiError {
    ApiError::unknown_route(method.as_str(), uri.path())
}

async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    // The route, not the path: a label must not have as many values as clients have ideas.
    let path = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    app.metrics
        .http_requests
        .with_label_values(&[
            response.status().as_str(),
            path.as_ref().map_or("other", MatchedPath::as_str),
        ])
        .inc();
    response
}

fn served_model(app: &App) -> Result<Model, ApiError> {
    Ok(Model {
        id: app.model_name.to_string(),
        object: "model",
        created: app.created,
        owned_by: "stoker",
        max_model_len: app.serving()?.max_model_len,
    })
}

/// The models that this server serves.
#[utoipa::path(get, path = "/v1/models", tag = "openai",
    responses((status = 200, body = ModelList), (status = 503, body = crate::openai::error::ErrorBody)))]
async fn models(
    State(app): State<Arc<App>>,
    accepted: Accepted,
) -> Result<Json<ModelList>, ApiError> {
    let _active = app.lifecycle.admit(accepted.at)?;
    Ok(Json(ModelList {
        object: "list",
        data: vec![served_model(&app)?],
    }))
}

/// One model, by name.
#[utoipa::path(get, path = "/v1/models/{model}", tag = "openai",
    params(("model" = String, Path, description = "the served name")),
    responses((status = 200, body = Model), (status = 404, body = crate::openai::error::ErrorBody),
        (status = 503, body = crate::openai::error::ErrorBody)))]
async fn model(
    State(app): State<Arc<App>>,
    accepted: Accepted,
    axum::extract::Path(name): axum::extract::Path<String>,
) -> Result<Json<Model>, ApiError> {
    let _active = app.lifecycle.admit(accepted.at)?;
    if *name != *app.model_name {
        return Err(ApiError::model_not_found(&name, &app.model_name));
    }
    Ok(Json(served_model(&app)?))
}

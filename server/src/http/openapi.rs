//! `GET /openapi.json`: the description of both ports, generated from the types.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;

use crate::openai::error::ApiError;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Stoker server",
        description = "OpenAI's API for one language model, with probes and metrics on the same \
                       port and control on a second one."
    ),
    paths(
        super::models,
        super::model,
        super::completions::completions,
        super::chat::chat_completions,
        super::probes::health,
        super::probes::ready,
        super::probes::live,
        super::probes::metrics,
        openapi_json,
        crate::control::get_limits,
        crate::control::patch_limits,
        crate::control::state,
        crate::control::leave,
        crate::control::rejoin,
        crate::control::profile::profile,
    ),
    tags(
        (name = "openai", description = "OpenAI's API (public port)"),
        (name = "probes", description = "Probes, metrics and this page (public port)"),
        (name = "control", description = "The operator's side (control port, signed tokens)")
    )
)]
struct Api;

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "probes",
    responses((status = 200, description = "OpenAPI 3.1", content_type = "application/json")))]
pub async fn openapi_json() -> Result<Response, ApiError> {
    let text = document().map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// The document as it is committed under docs/.
fn document() -> Result<String, serde_json::Error> {
    Api::openapi().to_pretty_json().map(|text| text + "\n")
}

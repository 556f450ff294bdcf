//! Probes and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::app::App;
use crate::lifecycle::Phase;
use crate::metrics::Include;
use crate::openai::error::{ApiError, ErrorBody};

/// A step that takes longer than this is taken for a hang.
const STEP_LIMIT_SECONDS: f64 = 30.0;

/// A probe's answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    /// `ok`, or what is going on instead: `loading`, `lame_duck`, `draining`, `failed`, `stuck`
    pub status: &'static str,
    /// How much of the model is loaded, while it loads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl Status {
    fn of(status: &'static str) -> Self {
        Self {
            status,
            percent: None,
            message: None,
        }
    }
}

/// Startup probe: the process is up.
#[utoipa::path(get, path = "/health", tag = "probes", responses((status = 200, body = Status)))]
pub async fn health() -> Json<Status> {
    Json(Status::of("ok"))
}

/// Readiness probe: the model is loaded and this replica is in the rotation.
#[utoipa::path(get, path = "/ready", tag = "probes",
    responses((status = 200, body = Status), (status = 503, body = Status)))]
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let phase = app.lifecycle.phase();
    let status = match &phase {
        Phase::Ready => return Json(Status::of("ok")).into_response(),
        Phase::Loading => Status {
            percent: Some((app.lifecycle.progress() * 100.0) as u32),
            ..Status::of(phase.name())
        },
        Phase::Failed { message } => Status {
            message: Some(message.clone()),
            ..Status::of(phase.name())
        },
        Phase::LameDuck | Phase::Draining { .. } => Status::of(phase.name()),
    };
    (StatusCode::SERVICE_UNAVAILABLE, Json(status)).into_response()
}

/// Liveness probe: no step of the engine hangs.
#[utoipa::path(get, path = "/live", tag = "probes",
    responses((status = 200, body = Status), (status = 500, body = Status)))]
pub async fn live(State(app): State<Arc<App>>) -> Response {
    let age = app.serving.get().map_or(0.0, |s| s.engine.step_age());
    let status = match app.lifecycle.phase() {
        Phase::Failed { message } => Status {
            message: Some(message),
            ..Status::of("failed")
        },
        _ if age > STEP_LIMIT_SECONDS => Status {
            message: Some(format!(
                "a step has taken {age:.0} s, the limit is {STEP_LIMIT_SECONDS:.0} s"
            )),
            ..Status::of("stuck")
        },
        _ => return Json(Status::of("ok")).into_response(),
    };
    (StatusCode::INTERNAL_SERVER_ERROR, Json(status)).into_response()
}

#[derive(Debug, Deserialize, IntoParams)]
pub struct MetricsQuery {
    /// `scaling`: only the series that the operator decides on.
    include: Option<String>,
}

/// Metrics in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "probes", params(MetricsQuery),
    responses((status = 200, description = "Prometheus text format 0.0.4", body = String),
        (status = 400, body = ErrorBody)))]
pub async fn metrics(
    State(app): State<Arc<App>>,
    Query(query): Query<MetricsQuery>,
) -> Result<Response, ApiError> {
    let include = match query.include.as_deref() {
        None => Include::All,
        Some("scaling") => Include::Scaling,
        Some(other) => {
            return Err(ApiError::invalid(
                "include",
                format!("include must be scaling or be left out, not {other:?}"),
            ));
        }
    };
    let text = app
        .metrics
        .render(include, &app.lifecycle, app.snapshot())
        .map_err(|e| ApiError::internal(format!("the metrics can't be written: {e}")))?;
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}

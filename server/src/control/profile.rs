//! Bracketing a window of the running server for a profiler.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::{Json, Router, routing::post};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Control, MAX_BODY_BYTES};
use crate::app::Profiler;
use crate::openai::error::{ApiError, ErrorBody};
use crate::openai::parse;

const LONGEST_SECONDS: f64 = 60.0;

/// How long to record.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProfileRequest {
    /// Above 0, at most 60.
    seconds: f64,
}

/// What the engine did meanwhile.
#[derive(Debug, Serialize, ToSchema)]
pub struct ProfileBody {
    pub steps: u64,
    /// Time that the device took for them.
    pub device_seconds: f64,
    /// New tokens.
    pub generated_tokens: u64,
    pub prompt_tokens: u64,
}

pub fn routes() -> Router<Arc<Control>> {
    Router::new().route("/control/v1/profile", post(profile))
}

/// Ends the recording also where the caller has gone away.
struct Recording<'a>(&'a Profiler);

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Err(error) = (self.0)(false) {
            tracing::warn!(error, "ending a profile");
        }
    }
}

/// Has a profiler that was started to wait (nsys profile --capture-range=cudaProfilerApi) record for
/// so many seconds, and tells what the engine did in them. For --device cuda only.
#[utoipa::path(post, path = "/control/v1/profile", tag = "control", request_body = ProfileRequest,
    responses((status = 200, body = ProfileBody), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn profile(
    State(control): State<Arc<Control>>,
    body: Body,
) -> Result<Json<ProfileBody>, ApiError> {
    let body = crate::http::read_body(body, MAX_BODY_BYTES).await?;
    let ProfileRequest { seconds } = parse(&body)?;
    if !(seconds > 0.0 && seconds <= LONGEST_SECONDS) {
        let message = format!("seconds is {seconds}, but must be above 0 and at most 60");
        return Err(ApiError::invalid("seconds", message));
    }
    let serving = control.app.serving()?;
    let Some(profiler) = &serving.profiler else {
        return Err(ApiError::bad_request(
            "there is nothing to profile: the device isn't an NVIDIA GPU (--device cuda)",
        ));
    };
    let Ok(profiler) = profiler.try_lock() else {
        return Err(ApiError::unavailable(
            "profiling",
            "a profile is being recorded",
            1,
        ));
    };
    let before = serving.engine.snapshot().stats;
    profiler(true).map_err(ApiError::internal)?;
    let recording = Recording(&profiler);
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    drop(recording);
    let after = serving.engine.snapshot().stats;
    Ok(Json(ProfileBody {
        steps: after.steps_total - before.steps_total,
        device_seconds: after.step_seconds_total - before.step_seconds_total,
        generated_tokens: after.generation_tokens_total - before.generation_tokens_total,
        prompt_tokens: after.prompt_tokens_total - before.prompt_tokens_total,
    }))
}

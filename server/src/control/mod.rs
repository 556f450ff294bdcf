//! The control port: the operator sets the dials and takes the replica out of the rotation.

pub mod profile;
mod token;

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, body::Body};
use serde::{Deserialize, Serialize};
use stoker_engine::Limits;
use utoipa::ToSchema;

use crate::app::App;
use crate::http::{method_not_allowed, unknown_route};
use crate::objectives::Objectives;
use crate::openai::error::{ApiError, ErrorBody};
use crate::openai::parse;

pub use token::{KeyError, TokenVerifier};

/// Largest body on this port.
const MAX_BODY_BYTES: usize = 64 << 10;

/// What the control port's handlers share.
pub struct Control {
    pub app: Arc<App>,
    /// `None`: no key was given, and the port listens on loopback only.
    pub verifier: Option<TokenVerifier>,
}

/// Everything on the control port.
pub fn router(control: Arc<Control>) -> Router {
    Router::new()
        .route("/control/v1/limits", get(get_limits).patch(patch_limits))
        .route("/control/v1/state", get(state))
        .route("/control/v1/drain", post(leave).delete(rejoin))
        .merge(profile::routes())
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_route)
        .layer(middleware::from_fn_with_state(
            control.clone(),
            authenticate,
        ))
        .with_state(control)
}

async fn authenticate(
    State(control): State<Arc<Control>>,
    request: Request,
    next: Next,
) -> Response {
    if let Some(verifier) = &control.verifier {
        let authorization = request.headers().get(header::AUTHORIZATION);
        if let Err(error) = verifier.verify(authorization).await {
            tracing::warn!(message = error.detail.message, "control request refused");
            return error.into_response();
        }
    }
    next.run(request).await
}

/// The dials and what is asked of requests.
#[derive(Debug, Serialize, ToSchema)]
pub struct LimitsBody {
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Tokens computed in one step.
    pub max_num_batched_tokens: u32,
    /// The most that `max_num_seqs` can be set to.
    pub max_num_seqs_ceiling: u32,
    /// The most that `max_num_batched_tokens` can be set to.
    pub max_num_batched_tokens_ceiling: u32,
    pub objectives: Objectives,
}

/// Changes to the dials and the objectives; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LimitsPatch {
    /// A value above the ceiling is lowered to it.
    #[schema(minimum = 1)]
    max_num_seqs: Option<u32>,
    /// A value above the ceiling is lowered to it.
    #[schema(minimum = 1)]
    max_num_batched_tokens: Option<u32>,
    objectives: Option<Objectives>,
}

fn limits_body(app: &App) -> Result<LimitsBody, ApiError> {
    let snapshot = app.serving()?.engine.snapshot();
    let (limits, ceilings) = (snapshot.stats.limits, snapshot.stats.ceilings);
    Ok(LimitsBody {
        max_num_seqs: limits.max_num_seqs,
        max_num_batched_tokens: limits.max_num_batched_tokens,
        max_num_seqs_ceiling: ceilings.max_num_seqs,
        max_num_batched_tokens_ceiling: ceilings.max_num_batched_tokens,
        objectives: snapshot.objectives,
    })
}

/// The dials as they are.
#[utoipa::path(get, path = "/control/v1/limits", tag = "control",
    responses((status = 200, body = LimitsBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn get_limits(State(control): State<Arc<Control>>) -> Result<Json<LimitsBody>, ApiError> {
    limits_body(&control.app).map(Json)
}

/// Sets dials and objectives, and answers with what is in effect.
#[utoipa::path(patch, path = "/control/v1/limits", tag = "control", request_body = LimitsPatch,
    responses((status = 200, body = LimitsBody), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 503, body = ErrorBody)))]
pub async fn patch_limits(
    State(control): State<Arc<Control>>,
    body: Body,
) -> Result<Json<LimitsBody>, ApiError> {
    let app = &control.app;
    let engine = &app.serving()?.engine;
    let body = crate::http::read_body(body, MAX_BODY_BYTES).await?;
    let patch: LimitsPatch = parse(&body)?;
    if let Some(objectives) = &patch.objectives {
        objectives
            .validate()
            .map_err(|e| ApiError::invalid("objectives", e.to_string()))?;
    }
    let before = engine.snapshot().stats.limits;
    let wanted = Limits {
        max_num_seqs: patch.max_num_seqs.unwrap_or(before.max_num_seqs),
        max_num_batched_tokens: patch
            .max_num_batched_tokens
            .unwrap_or(before.max_num_batched_tokens),
    };
    if let Some(objectives) = patch.objectives {
        engine.set_objectives(objectives);
    }
    // Even without a change of the dials: the answer comes after the objectives are in effect.
    match engine.set_limits(wanted).await {
        Some(Ok(limits)) if limits != before => {
            tracing::info!(
                max_num_seqs = limits.max_num_seqs,
                max_num_batched_tokens = limits.max_num_batched_tokens,
                "dials"
            );
        }
        Some(Ok(_)) => {}
        Some(Err(error)) => return Err(ApiError::bad_request(error.to_string())),
        None => return Err(ApiError::internal("the engine has failed")),
    }
    limits_body(app).map(Json)
}

/// How the replica is doing.
#[derive(Debug, Serialize, ToSchema)]
pub struct StateBody {
    pub version: &'static str,
    pub model: String,
    /// `loading`, `ready`, `lame_duck`, `draining` or `failed`
    pub phase: &'static str,
    /// How much of the model is loaded.
    pub percent: u32,
    /// API requests whose answer is not complete.
    pub active_requests: usize,
    /// Highest lease epoch seen in a token.
    pub epoch: Option<u64>,
    pub engine: Option<EngineState>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct EngineState {
    pub running: u32,
    pub waiting: u32,
    pub waiting_prompt_tokens: u64,
    pub kv_tokens: u64,
    pub kv_capacity_tokens: u64,
    pub preemptions_total: u64,
    pub steps_total: u64,
    pub limits: LimitsBody,
    pub law: LawBody,
}

/// The step-time law, in seconds.
#[derive(Debug, Serialize, ToSchema)]
pub struct LawBody {
    pub base: f64,
    pub per_kv_token: f64,
    pub per_token: f64,
    pub per_sequence: f64,
    pub hidden: f64,
    pub confidence: f64,
}

/// The replica's state.
#[utoipa::path(get, path = "/control/v1/state", tag = "control",
    responses((status = 200, body = StateBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody)))]
pub async fn state(State(control): State<Arc<Control>>) -> Json<StateBody> {
    Json(state_body(&control))
}

fn state_body(control: &Control) -> StateBody {
    let app = &control.app;
    let engine = app.snapshot().and_then(|snapshot| {
        let stats = snapshot.stats;
        Some(EngineState {
            running: stats.running,
            waiting: stats.waiting,
            waiting_prompt_tokens: stats.waiting_prompt_tokens,
            kv_tokens: stats.kv_tokens,
            kv_capacity_tokens: u64::from(stats.kv_blocks_total) * u64::from(stats.kv_block_size),
            preemptions_total: stats.preemptions_total,
            steps_total: stats.steps_total,
            limits: limits_body(app).ok()?,
            law: LawBody {
                base: stats.law.base,
                per_kv_token: stats.law.per_kv_token,
                per_token: stats.law.per_token,
                per_sequence: stats.law.per_sequence,
                hidden: stats.law.hidden,
                confidence: stats.law_confidence,
            },
        })
    });
    StateBody {
        version: env!("CARGO_PKG_VERSION"),
        model: app.model_name.to_string(),
        phase: app.lifecycle.phase().name(),
        percent: (app.lifecycle.progress() * 100.0) as u32,
        active_requests: app.lifecycle.active(),
        epoch: control.verifier.as_ref().and_then(TokenVerifier::epoch),
        engine,
    }
}

/// Takes the replica out of the rotation: not ready from now on, it still serves what comes and
/// closes each connection after its next answer. SIGTERM then ends it.
#[utoipa::path(post, path = "/control/v1/drain", tag = "control",
    responses((status = 200, body = StateBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody)))]
pub async fn leave(State(control): State<Arc<Control>>) -> Json<StateBody> {
    control.app.lifecycle.set_lame_duck(true);
    Json(state_body(&control))
}

/// Puts the replica back into the rotation.
#[utoipa::path(delete, path = "/control/v1/drain", tag = "control",
    responses((status = 200, body = StateBody), (status = 401, body = ErrorBody),
        (status = 403, body = ErrorBody)))]
pub async fn rejoin(State(control): State<Arc<Control>>) -> Json<StateBody> {
    control.app.lifecycle.set_lame_duck(false);
    Json(state_body(&control))
}

//! Bracketing a window of the running server for a profiler, and its own breakdown by kernel class.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::{Json, Router, routing::post};
use serde::{Deserialize, Serialize};
use stoker_model::cuda::{Breakdown, GpuProfiler};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::{Control, MAX_BODY_BYTES};
use crate::openai::error::{ApiError, ErrorBody};
use crate::openai::parse;

const LONGEST_SECONDS: f64 = 60.0;

/// Steps that are broken down after the window.
const BROKEN_DOWN_STEPS: u32 = 20;

/// Longest wait for those steps: an idle server has none.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

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
    /// Up to 20 steps after the window, whose kernels were timed.
    pub breakdown: BreakdownBody,
}

/// Where the time of some steps went.
#[derive(Debug, Serialize, ToSchema)]
pub struct BreakdownBody {
    /// 0 where the server was idle.
    pub steps: u32,
    /// Time of the device for them: more than in the window, where kernels overlap.
    pub device_seconds: f64,
    /// Rate of a large copy on this card, bytes read and written, measured at the start.
    pub copy_bytes_per_second: f64,
    pub classes: Vec<KernelClassBody>,
}

/// Kernels of one class.
#[derive(Debug, Serialize, ToSchema)]
pub struct KernelClassBody {
    pub class: String,
    pub seconds_per_step: f64,
    /// Share of the steps' time.
    pub of_time: f64,
    /// Rate at which weights, keys and values were read; absent for classes that read none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<f64>,
    /// The same over the rate of a copy: the share of the memory roofline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub of_copy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flops_per_second: Option<f64>,
}

pub fn routes() -> Router<Arc<Control>> {
    Router::new().route("/control/v1/profile", post(profile))
}

/// Ends the recording also where the caller has gone away.
struct Recording<'a>(&'a GpuProfiler);

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.record(false) {
            tracing::warn!(%error, "ending a profile");
        }
    }
}

/// Has a profiler that was started to wait (nsys profile --capture-range=cudaProfilerApi) record for
/// so many seconds, and tells what the engine did in them; then times the kernels of up to 20
/// steps, tells where their time went, and logs it. For --device cuda only.
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
    profiler
        .record(true)
        .map_err(|e| ApiError::internal(e.to_string()))?;
    let recording = Recording(&profiler);
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
    drop(recording);
    let after = serving.engine.snapshot().stats;
    let breakdown = BreakdownBody::new(break_down(&profiler).await, profiler.copy_rate());
    breakdown.log();
    Ok(Json(ProfileBody {
        steps: after.steps_total - before.steps_total,
        device_seconds: after.step_seconds_total - before.step_seconds_total,
        generated_tokens: after.generation_tokens_total - before.generation_tokens_total,
        prompt_tokens: after.prompt_tokens_total - before.prompt_tokens_total,
        breakdown,
    }))
}

/// Waits until the next steps are broken down, or for as long as is bearable.
async fn break_down(profiler: &GpuProfiler) -> Breakdown {
    profiler.break_down(BROKEN_DOWN_STEPS);
    let begun = Instant::now();
    while begun.elapsed() < LONGEST_WAIT && profiler.found(false).steps < BROKEN_DOWN_STEPS {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    profiler.found(true)
}

impl BreakdownBody {
    fn new(found: Breakdown, copy_rate: f64) -> Self {
        let classes = found.classes.iter().map(|class| {
            let rate = |amount: f64| (amount > 0.0).then(|| amount / class.seconds);
            KernelClassBody {
                class: class.class.to_owned(),
                seconds_per_step: class.seconds / f64::from(found.steps),
                of_time: class.seconds / found.seconds,
                bytes_per_second: rate(class.bytes),
                of_copy: rate(class.bytes).map(|rate| rate / copy_rate),
                flops_per_second: rate(class.flops),
            }
        });
        Self {
            steps: found.steps,
            device_seconds: found.seconds,
            copy_bytes_per_second: copy_rate,
            classes: classes.collect(),
        }
    }

    fn log(&self) {
        for class in &self.classes {
            tracing::info!(
                class = class.class,
                us_per_step = (class.seconds_per_step * 1e6).round(),
                percent_of_time = (class.of_time * 100.0).round(),
                percent_of_copy = class.of_copy.map(|share| (share * 100.0).round()),
                tflops = class.flops_per_second.map(|rate| (rate / 1e12).round()),
                "kernels"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use stoker_model::cuda::KernelClass;

    use super::*;

    #[test]
    fn a_breakdown_gives_shares_of_time_and_of_the_roofline() {
        let class = |class, seconds, bytes| KernelClass {
            class,
            seconds,
            bytes,
            flops: 0.0,
        };
        let found = Breakdown {
            steps: 10,
            seconds: 0.02,
            classes: vec![class("down", 0.015, 3e10), class("sampling", 0.005, 0.0)],
        };
        let body = BreakdownBody::new(found, 4e12);
        let [down, sampling] = body.classes.as_slice() else {
            panic!("{body:?}");
        };
        assert!((down.seconds_per_step - 0.0015).abs() < 1e-12);
        assert!((down.of_time - 0.75).abs() < 1e-12);
        assert!((down.of_copy.unwrap() - 0.5).abs() < 1e-12);
        assert_eq!((sampling.of_copy, sampling.flops_per_second), (None, None));
        let idle = serde_json::to_value(BreakdownBody::new(Breakdown::default(), 4e12)).unwrap();
        assert_eq!(idle["classes"], serde_json::json!([]));
    }
}

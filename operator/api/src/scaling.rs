//! What requests may expect, and how replicas follow.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::embed;

/// What a request may expect.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Objectives {
    /// Percent of requests that should meet all objectives.
    #[serde(default = "good_percent")]
    #[schemars(range(min = 50, max = 100))]
    pub good_percent: i32,

    /// Time from a request's arrival to its first token.
    #[serde(default)]
    pub time_to_first_token: TimeToFirstToken,

    /// Time between two tokens of one answer.
    #[serde(default)]
    pub inter_token_latency: InterTokenLatency,
}

/// A request meets it when its first token comes within milliseconds + millisecondsPerPromptToken * max(0, prompt tokens - freePromptTokens).
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TimeToFirstToken {
    /// Allowance of every request.
    #[serde(default = "ttft_milliseconds")]
    #[schemars(range(min = 1, max = 600_000))]
    pub milliseconds: i32,

    /// Prompt tokens that the allowance of every request covers.
    #[serde(default = "free_prompt_tokens")]
    #[schemars(range(min = 0, max = 1_048_576))]
    pub free_prompt_tokens: i32,

    /// Further allowance for each prompt token beyond freePromptTokens.
    #[serde(default = "milliseconds_per_prompt_token")]
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub milliseconds_per_prompt_token: f64,
}

/// A request meets it when the mean (or the 95th percentile) of the gaps between its tokens is at most milliseconds.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InterTokenLatency {
    /// Longest allowed gap.
    #[serde(default = "itl_milliseconds")]
    #[schemars(range(min = 1, max = 60_000))]
    pub milliseconds: i32,

    /// Which gap of a request counts: `mean` or `p95`.
    #[serde(default)]
    pub of: ItlStatistic,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ItlStatistic {
    #[default]
    Mean,
    P95,
}

impl ItlStatistic {
    /// As the server's objectives spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            ItlStatistic::Mean => "mean",
            ItlStatistic::P95 => "p95",
        }
    }
}

/// How the number of replicas is decided.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.minReplicas <= self.maxReplicas")
        .message("scaling.maxReplicas must be at least scaling.minReplicas (defaults: 4 and 1): raise maxReplicas or lower minReplicas")
        .field_path(".maxReplicas"),
)]
pub struct Scaling {
    /// `Auto`: replicas follow the load. `Recommend`: what would be decided is reported, and nothing changes: replicas are spec.replicas, and dials stay. `Manual`: replicas are spec.replicas, and only the dials follow the load. Who changes to Manual should set spec.replicas in the same change.
    #[serde(default)]
    pub mode: ScalingMode,

    /// Fewest replicas in mode Auto. With 0 a service that nobody uses sleeps: the router holds the next request while a replica starts. A new service starts with one replica even so, which shows whether it runs, and sleeps once nobody has used it for idleSeconds.
    #[serde(default = "min_replicas")]
    #[schemars(range(min = 0, max = 1000))]
    pub min_replicas: i32,

    /// With minReplicas 0: how long no request must have come before the last replica goes.
    #[serde(default = "idle_seconds")]
    #[schemars(range(min = 10, max = 86_400))]
    pub idle_seconds: i32,

    /// Most replicas in mode Auto; when more are needed, the dials carry on alone.
    #[serde(default = "max_replicas")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: i32,

    /// How long fewer replicas must have been enough before some go. About as long as a replica takes to start: an idle one costs no more until then than a new one would.
    #[serde(default = "scale_down_stabilization_seconds")]
    #[schemars(range(min = 0, max = 86_400))]
    pub scale_down_stabilization_seconds: i32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ScalingMode {
    #[default]
    Auto,
    Recommend,
    Manual,
}

/// How pods are replaced when their template changes. The default needs no spare GPU: an old pod goes before its successor comes, so a service with one replica has a gap.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!(string(self.maxSurge) in ['0', '0%'] && string(self.maxUnavailable) in ['0', '0%'])")
        .message("rollout.maxSurge and rollout.maxUnavailable must not both be 0, or no pod could be replaced: set one of them to 1"),
)]
pub struct Rollout {
    /// Pods beyond the wanted number during a rollout; a count or a percentage.
    #[serde(default = "max_surge")]
    #[schemars(schema_with = "embed::count_or_percent")]
    pub max_surge: IntOrString,

    /// Pods that may be missing during a rollout; a count or a percentage.
    #[serde(default = "max_unavailable")]
    #[schemars(schema_with = "embed::count_or_percent")]
    pub max_unavailable: IntOrString,
}

fn good_percent() -> i32 {
    99
}

fn ttft_milliseconds() -> i32 {
    2000
}

fn free_prompt_tokens() -> i32 {
    1000
}

fn milliseconds_per_prompt_token() -> f64 {
    1.0
}

fn itl_milliseconds() -> i32 {
    100
}

fn min_replicas() -> i32 {
    1
}

fn idle_seconds() -> i32 {
    600
}

fn max_replicas() -> i32 {
    4
}

fn scale_down_stabilization_seconds() -> i32 {
    75
}

fn max_surge() -> IntOrString {
    IntOrString::Int(0)
}

fn max_unavailable() -> IntOrString {
    IntOrString::Int(1)
}

impl Default for Objectives {
    fn default() -> Self {
        Objectives {
            good_percent: good_percent(),
            time_to_first_token: TimeToFirstToken::default(),
            inter_token_latency: InterTokenLatency::default(),
        }
    }
}

impl Default for TimeToFirstToken {
    fn default() -> Self {
        TimeToFirstToken {
            milliseconds: ttft_milliseconds(),
            free_prompt_tokens: free_prompt_tokens(),
            milliseconds_per_prompt_token: milliseconds_per_prompt_token(),
        }
    }
}

impl Default for InterTokenLatency {
    fn default() -> Self {
        InterTokenLatency {
            milliseconds: itl_milliseconds(),
            of: ItlStatistic::default(),
        }
    }
}

impl Default for Scaling {
    fn default() -> Self {
        Scaling {
            mode: ScalingMode::default(),
            min_replicas: min_replicas(),
            idle_seconds: idle_seconds(),
            max_replicas: max_replicas(),
            scale_down_stabilization_seconds: scale_down_stabilization_seconds(),
        }
    }
}

impl Default for Rollout {
    fn default() -> Self {
        Rollout {
            max_surge: max_surge(),
            max_unavailable: max_unavailable(),
        }
    }
}

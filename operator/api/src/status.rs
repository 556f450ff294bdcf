//! What the operator reports back. Measured numbers are rounded to integers, so that noise alone writes nothing.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::embed;

/// Observed state of the service.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InferenceServiceStatus {
    /// Generation of the spec that this status describes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,

    /// Ready, Available, Progressing, ModelLoaded, Scheduled, ScalingActive, ObjectivesMet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embed::conditions")]
    pub conditions: Vec<Condition>,

    /// Replicas that are wanted; the Deployment follows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub desired_replicas: Option<i32>,

    /// Pods that exist.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub replicas: Option<i32>,

    /// Pods that answer requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ready_replicas: Option<i32>,

    /// Label selector of the pods, for the scale subresource.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub selector: Option<String>,

    /// Where the replicas' dials stand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dials: Option<DialsStatus>,

    /// Base URL inside the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub endpoint: Option<String>,

    /// How far the model's loading is, in the replica that is furthest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loading: Option<LoadingStatus>,

    /// Load and latency of the last minute or so, all replicas together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadStatus>,

    /// The step-time law: how long a step of the engine takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub law: Option<LawStatus>,

    /// In one CamelCase word, why the service stands as it does; sentences are in the conditions.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub reason: Option<String>,
}

/// Where the replicas' dials stand.
#[derive(KubeSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DialsStatus {
    /// The cap: sequences that one replica runs at once.
    #[schemars(range(min = 0))]
    pub max_num_seqs: i32,

    /// The budget: tokens that one step may compute.
    #[schemars(range(min = 0))]
    pub max_num_batched_tokens: i32,
}

/// How far the model's loading is.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadingStatus {
    /// What is being done, such as Pending, Loading or Ready.
    #[schemars(length(max = 64))]
    pub phase: String,

    /// Percent of the weights that are loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub percent: Option<i32>,

    /// Seconds that loading will still take.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub eta_seconds: Option<i32>,
}

/// Load and latency, all replicas together.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadStatus {
    /// Requests that arrived a second.
    #[schemars(range(min = 0))]
    pub requests_per_second: i32,

    /// Tokens that were generated a second.
    #[schemars(range(min = 0))]
    pub tokens_per_second: i32,

    /// Percent of finished requests that met all objectives; left out when none finished.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub good_percent: Option<i32>,

    /// 95th percentile of the time to first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttft_p95_ms: Option<i32>,

    /// 95th percentile of the gap between two tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub itl_p95_ms: Option<i32>,

    /// Sequences that run.
    #[schemars(range(min = 0))]
    pub running: i32,

    /// Requests that wait.
    #[schemars(range(min = 0))]
    pub waiting: i32,
}

/// A step takes base + perKvToken * cached tokens for memory, perToken * tokens for computing, of which a part hides behind the first, and perSequence * sequences.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LawStatus {
    /// Time of every step.
    #[schemars(range(min = 0))]
    pub base_microseconds: i32,

    /// Time of each token in the KV cache of the running sequences.
    #[schemars(range(min = 0))]
    pub per_kv_token_nanoseconds: i32,

    /// Time of each token that the step computes.
    #[schemars(range(min = 0))]
    pub per_token_nanoseconds: i32,

    /// Time of each sequence in the step.
    #[schemars(range(min = 0))]
    pub per_sequence_microseconds: i32,

    /// How much of the computing hides behind reading memory.
    #[schemars(range(min = 0, max = 100))]
    pub hidden_percent: i32,

    /// How sure the fit is.
    #[schemars(range(min = 0, max = 100))]
    pub confidence_percent: i32,
}

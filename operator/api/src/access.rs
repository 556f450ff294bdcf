//! Who may use a service.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// Who may use the service, and how much. The router sees to it: without one, every request is answered.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Access {
    /// Secret in the same namespace with the API keys. Of each entry the value is the key that clients send as `Authorization: Bearer`, and the name is what logs and metrics tell instead.
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    )]
    pub api_key_secret: String,

    /// Requests a minute of each key; without it as many as come.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub requests_per_minute: Option<i32>,

    /// Tokens a minute of each key, prompts and answers; without it as many as come.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub tokens_per_minute: Option<i32>,

    /// Limits of single keys, instead of those above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub per_key: Vec<KeyLimits>,
}

/// Limits of one key.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyLimits {
    /// Name of the entry in the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,

    /// Requests a minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub requests_per_minute: Option<i32>,

    /// Tokens a minute, prompts and answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub tokens_per_minute: Option<i32>,
}

//! Settings of the pods that a person may choose.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, EnvVar, LocalObjectReference, Toleration, TopologySpreadConstraint, Volume,
    VolumeMount,
};
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::embed;

/// Settings of the pods.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.labels) || self.labels.all(k, !k.startsWith('serving.stoker.dev/') && !k.startsWith('app.kubernetes.io/') && k != 'pod-template-hash')")
        .message("pod.labels must not set serving.stoker.dev/*, app.kubernetes.io/* or pod-template-hash, which Stoker and Kubernetes set: use another key")
        .field_path(".labels"),
    validation = Rule::new("!has(self.annotations) || self.annotations.all(k, !k.startsWith('serving.stoker.dev/') && k != 'controller.kubernetes.io/pod-deletion-cost')")
        .message("pod.annotations must not set serving.stoker.dev/* or controller.kubernetes.io/pod-deletion-cost, which Stoker sets: use another key")
        .field_path(".annotations"),
    validation = Rule::new("!has(self.env) || self.env.all(e, e.name != 'POD_UID' && !e.name.startsWith('STOKER_'))")
        .message("pod.env must not set POD_UID or STOKER_*, which Stoker sets: use the fields of the spec or engine.extraArgs")
        .field_path(".env"),
    validation = Rule::new("!has(self.volumes) || self.volumes.all(v, !v.name.startsWith('stoker-'))")
        .message("names of pod.volumes must not start with stoker-, which Stoker's own volumes do: use another name")
        .field_path(".volumes"),
    validation = Rule::new("!has(self.volumeMounts) || self.volumeMounts.all(m, has(self.volumes) && self.volumes.exists(v, v.name == m.name))")
        .message("each of pod.volumeMounts needs a volume of the same name in pod.volumes: add it, or correct the name")
        .field_path(".volumeMounts"),
    validation = Rule::new("!has(self.volumeMounts) || self.volumeMounts.all(m, !m.mountPath.matches('^/+(etc/+stoker|var/+lib/+stoker)(/|$)'))")
        .message("pod.volumeMounts must not cover /etc/stoker or /var/lib/stoker, where Stoker mounts its own volumes: use another mountPath")
        .field_path(".volumeMounts"),
)]
pub struct PodSettings {
    /// Image of stoker-server; without it the image that the operator was started with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = "^[^ \\t\\r\\n]+$"))]
    pub image: Option<String>,

    /// Secrets with credentials for the image's registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embed::image_pull_secrets")]
    pub image_pull_secrets: Vec<LocalObjectReference>,

    /// Further labels of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embed::labels")]
    pub labels: BTreeMap<String, String>,

    /// Further annotations of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embed::annotations")]
    pub annotations: BTreeMap<String, String>,

    /// Further environment variables of the server container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embed::env")]
    pub env: Vec<EnvVar>,

    /// Labels that a node must carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "embed::labels")]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that the pods tolerate, beside the accelerator's, which is tolerated by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embed::tolerations")]
    pub tolerations: Vec<Toleration>,

    /// Nodes and neighbours that the pods prefer or need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "embed::affinity")]
    pub affinity: Option<Affinity>,

    /// How the pods spread over zones or nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embed::topology_spread_constraints")]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,

    /// PriorityClass of the pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// RuntimeClass of the pods, such as `nvidia`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,

    /// Further volumes of the pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embed::volumes")]
    pub volumes: Vec<Volume>,

    /// Where the server container sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "embed::volume_mounts")]
    pub volume_mounts: Vec<VolumeMount>,
}

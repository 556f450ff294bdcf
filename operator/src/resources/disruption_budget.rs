use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::Blueprint;

/// One replica at a time may be evicted. Not minAvailable: with one replica that would block node
/// drains for ever. A pod that isn't ready may always go.
pub fn build(blueprint: &Blueprint<'_>) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: blueprint.meta(blueprint.name),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(blueprint.selector()),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment,
};

use super::{Blueprint, pod_template};

/// The replicas. `replicas` is always stated: an apply without it would reset it to 1.
pub fn build(blueprint: &Blueprint<'_>) -> Deployment {
    let rollout = &blueprint.spec.rollout;
    Deployment {
        metadata: blueprint.meta(blueprint.name),
        spec: Some(DeploymentSpec {
            replicas: Some(i32::try_from(blueprint.replicas).unwrap_or(i32::MAX)),
            revision_history_limit: Some(3),
            selector: blueprint.selector(),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".to_owned()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(rollout.max_surge.clone()),
                    max_unavailable: Some(rollout.max_unavailable.clone()),
                }),
            }),
            template: pod_template::build(blueprint),
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

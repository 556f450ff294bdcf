use k8s_openapi::api::core::v1::ServiceAccount;

use super::Blueprint;

/// An identity without rights: the server never talks to the Kubernetes API.
pub fn build(blueprint: &Blueprint<'_>) -> ServiceAccount {
    ServiceAccount {
        metadata: blueprint.meta(blueprint.name),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

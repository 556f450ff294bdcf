use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use stoker_api::names;

use super::Blueprint;

/// The public half of the control key, which the pods check tokens with.
pub fn build(blueprint: &Blueprint<'_>) -> ConfigMap {
    ConfigMap {
        metadata: blueprint.meta(&names::control_config_map(blueprint.name)),
        data: Some(BTreeMap::from([(
            names::PUBLIC_KEY.to_owned(),
            blueprint.settings.control_public_pem.clone(),
        )])),
        ..ConfigMap::default()
    }
}

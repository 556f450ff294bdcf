//! What a pod needs whose server downloads its model: a cache, the hub and a token.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, Container, EmptyDirVolumeSource, EnvVar, EnvVarSource, HostPathVolumeSource,
    ResourceRequirements, SecretKeySelector, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use stoker_api::{ModelSource, names};

use super::Blueprint;

/// The server reads the hub's URL from here where no flag gives it.
pub const HUB_ENDPOINT_ENV: &str = "HF_ENDPOINT";
/// And the token always.
const TOKEN_ENV: &str = "HF_TOKEN";

/// The download's part of a pod; nothing where the model is on a volume.
#[derive(Default)]
pub struct Download {
    pub args: Vec<String>,
    pub env: Vec<EnvVar>,
    pub volume: Option<Volume>,
    pub mount: Option<VolumeMount>,
    pub init_container: Option<Container>,
}

pub fn build(blueprint: &Blueprint<'_>) -> Download {
    let source = match &blueprint.source {
        Some(ModelSource::Hub { reference }) => reference,
        Some(ModelSource::Url { url }) => url,
        _ => return Download::default(),
    };
    let own_env = |name: &str| blueprint.spec.pod.env.iter().any(|e| e.name == name);
    let mut args = vec![
        format!("--model={source}"),
        format!("--model-cache={}", names::CACHE_MOUNT_PATH),
    ];
    if let Some(endpoint) = &blueprint.settings.hub_endpoint
        && !own_env(HUB_ENDPOINT_ENV)
    {
        args.push(format!("--hub-endpoint={endpoint}"));
    }
    let token = blueprint.spec.model.secret_ref.as_ref();
    let token = token.filter(|_| !own_env(TOKEN_ENV)).map(|secret| EnvVar {
        name: TOKEN_ENV.to_owned(),
        value_from: Some(EnvVarSource {
            secret_key_ref: Some(SecretKeySelector {
                name: secret.name.clone(),
                key: secret.key.clone(),
                optional: None,
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    });
    let host_path = blueprint.settings.model_cache_host_path.as_ref();
    Download {
        args,
        env: token.into_iter().collect(),
        volume: Some(volume(host_path)),
        mount: Some(mount()),
        init_container: host_path.map(|_| init_container(blueprint)),
    }
}

/// The node's directory, or one that goes with the pod.
fn volume(host_path: Option<&String>) -> Volume {
    Volume {
        name: names::CACHE_VOLUME.to_owned(),
        host_path: host_path.map(|path| HostPathVolumeSource {
            path: path.clone(),
            type_: Some("DirectoryOrCreate".to_owned()),
        }),
        empty_dir: match host_path {
            Some(_) => None,
            None => Some(EmptyDirVolumeSource::default()),
        },
        ..Volume::default()
    }
}

fn mount() -> VolumeMount {
    VolumeMount {
        name: names::CACHE_VOLUME.to_owned(),
        mount_path: names::CACHE_MOUNT_PATH.to_owned(),
        ..VolumeMount::default()
    }
}

/// A directory that the kubelet makes belongs to root, and fsGroup doesn't reach the node's own
/// file system: root has to give it to the server's user, and may do nothing else.
fn init_container(blueprint: &Blueprint<'_>) -> Container {
    let quantities = |cpu: Option<&str>, memory: &str| {
        let cpu = cpu.map(|cpu| ("cpu".to_owned(), Quantity(cpu.to_owned())));
        let memory = ("memory".to_owned(), Quantity(memory.to_owned()));
        Some(cpu.into_iter().chain([memory]).collect::<BTreeMap<_, _>>())
    };
    Container {
        name: names::CACHE_CONTAINER.to_owned(),
        image: Some(blueprint.image().to_owned()),
        image_pull_policy: Some(blueprint.settings.image_pull_policy.clone()),
        args: Some(vec![format!(
            "--prepare-model-cache={}",
            names::CACHE_MOUNT_PATH
        )]),
        resources: Some(ResourceRequirements {
            requests: quantities(Some("10m"), "16Mi"),
            limits: quantities(None, "64Mi"),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(vec![mount()]),
        security_context: Some(SecurityContext {
            run_as_user: Some(0),
            run_as_group: Some(0),
            run_as_non_root: Some(false),
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                add: Some(vec!["CHOWN".to_owned()]),
            }),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..Container::default()
    }
}

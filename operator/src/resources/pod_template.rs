//! The pod of one replica.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EnvVar, EnvVarSource,
    HTTPGetAction, Lifecycle, LifecycleHandler, ObjectFieldSelector,
    PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
    ResourceRequirements, SeccompProfile, SecurityContext, SleepAction, Toleration, Volume,
    VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use stoker_api::{Dtype, ModelSource, names};

use super::download::Download;
use super::{Blueprint, download};

/// Served on after the pod was told to go: endpoints are removed asynchronously.
const PRE_STOP_SECONDS: i64 = 5;
/// What a replica that was told to stop may take to finish what it runs.
const DRAIN_SECONDS: i64 = 285;
/// The rest is for the process to exit.
const GRACE_SECONDS: i64 = PRE_STOP_SECONDS + DRAIN_SECONDS + 10;
const DRAIN_FLAG: &str = "--drain-timeout-seconds";
/// User and group of the images.
const NON_ROOT: i64 = 65532;

pub fn build(blueprint: &Blueprint<'_>) -> PodTemplateSpec {
    let pod = &blueprint.spec.pod;
    let download = download::build(blueprint);
    let mut labels = pod.labels.clone();
    labels.extend(blueprint.labels());
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: non_empty(pod.annotations.clone()),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            service_account_name: Some(blueprint.name.to_owned()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            termination_grace_period_seconds: Some(GRACE_SECONDS),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(NON_ROOT),
                run_as_group: Some(NON_ROOT),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".to_owned(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            init_containers: download.init_container.clone().map(|c| vec![c]),
            containers: vec![container(blueprint, &download)],
            volumes: Some(volumes(blueprint, &download)),
            tolerations: non_empty_list(tolerations(blueprint)),
            image_pull_secrets: non_empty_list(pod.image_pull_secrets.clone()),
            node_selector: non_empty(pod.node_selector.clone()),
            affinity: pod.affinity.clone(),
            topology_spread_constraints: non_empty_list(pod.topology_spread_constraints.clone()),
            priority_class_name: pod.priority_class_name.clone(),
            runtime_class_name: pod.runtime_class_name.clone(),
            ..PodSpec::default()
        }),
    }
}

fn container(blueprint: &Blueprint<'_>, download: &Download) -> Container {
    let settings = blueprint.settings;
    Container {
        name: names::SERVER_CONTAINER.to_owned(),
        image: Some(blueprint.image().to_owned()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        args: Some(args(blueprint, download)),
        env: Some(env(blueprint, download)),
        ports: Some(vec![
            port(names::HTTP_PORT_NAME, names::HTTP_PORT),
            port(names::CONTROL_PORT_NAME, names::CONTROL_PORT),
        ]),
        resources: Some(resources(blueprint)),
        volume_mounts: Some(volume_mounts(blueprint, download)),
        // The port answers while the model loads, so a start takes seconds even where loading takes
        // minutes: the readiness probe waits for the model.
        startup_probe: Some(probe("/health", 1, 3, 60)),
        readiness_probe: Some(probe("/ready", 1, 3, 3)),
        // Fails when a step overruns 30 s; a restart costs minutes, so it takes a minute to be sure.
        liveness_probe: Some(probe("/live", 10, 10, 6)),
        lifecycle: Some(Lifecycle {
            pre_stop: Some(LifecycleHandler {
                sleep: Some(SleepAction {
                    seconds: PRE_STOP_SECONDS,
                }),
                ..LifecycleHandler::default()
            }),
            ..Lifecycle::default()
        }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                ..Capabilities::default()
            }),
            ..SecurityContext::default()
        }),
        // The last log lines of a crash become part of the pod's status, and so of ours.
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..Container::default()
    }
}

fn args(blueprint: &Blueprint<'_>, download: &Download) -> Vec<String> {
    let engine = &blueprint.spec.engine;
    let mut args = Vec::new();
    let mut set = |flag: &str, value: String| args.push(format!("{flag}={value}"));
    set("--device", engine.device.as_str().to_owned());
    if let Some(profile) = engine.simulated_profile {
        set("--simulated-profile", profile.as_str().to_owned());
    }
    match &blueprint.source {
        Some(ModelSource::Claim { path, .. }) => {
            set("--model", format!("{}/{path}", names::MODEL_MOUNT_PATH));
        }
        Some(ModelSource::File { path }) => set("--model", path.clone()),
        Some(ModelSource::Hub { .. } | ModelSource::Url { .. }) | None => {}
    }
    if blueprint.spec.model.dtype != Dtype::Auto {
        set("--dtype", blueprint.spec.model.dtype.as_str().to_owned());
    }
    let served_name = blueprint.spec.served_name(blueprint.name);
    set("--served-model-name", served_name.to_owned());
    set("--port", names::HTTP_PORT.to_string());
    set("--control-port", names::CONTROL_PORT.to_string());
    let key = format!("{}/{}", names::CONTROL_MOUNT_PATH, names::PUBLIC_KEY);
    set("--control-key", key);
    if let Some(length) = engine.max_model_len {
        set("--max-model-len", length.to_string());
    }
    let utilization = engine.memory_utilization.to_string();
    set("--gpu-memory-utilization", utilization);
    set("--max-num-seqs", engine.max_num_seqs.initial.to_string());
    let budget = engine.max_num_batched_tokens.initial;
    set("--max-num-batched-tokens", budget.to_string());
    let own_drain = |arg: &String| arg.split('=').next() == Some(DRAIN_FLAG);
    if !engine.extra_args.iter().any(own_drain) {
        set(DRAIN_FLAG, DRAIN_SECONDS.to_string());
    }
    args.extend(download.args.iter().cloned());
    args.extend(engine.extra_args.iter().cloned());
    args
}

fn env(blueprint: &Blueprint<'_>, download: &Download) -> Vec<EnvVar> {
    let uid = EnvVar {
        name: "POD_UID".to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                api_version: Some("v1".to_owned()),
                field_path: "metadata.uid".to_owned(),
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    };
    let mut env = vec![uid];
    env.extend(download.env.iter().cloned());
    env.extend(blueprint.spec.pod.env.iter().cloned());
    env
}

fn resources(blueprint: &Blueprint<'_>) -> ResourceRequirements {
    let resources = &blueprint.spec.resources;
    let mut limits = resources.limits.clone();
    if let Some(accelerator) = &resources.accelerator {
        let count = Quantity(accelerator.count.to_string());
        limits.insert(accelerator.resource.clone(), count);
    }
    ResourceRequirements {
        requests: non_empty(resources.requests.clone()),
        limits: non_empty(limits),
        ..ResourceRequirements::default()
    }
}

/// Nodes with accelerators are commonly tainted with the resource's name.
fn tolerations(blueprint: &Blueprint<'_>) -> Vec<Toleration> {
    let accelerator = blueprint.spec.resources.accelerator.as_ref();
    let own = accelerator.map(|accelerator| Toleration {
        key: Some(accelerator.resource.clone()),
        operator: Some("Exists".to_owned()),
        effect: Some("NoSchedule".to_owned()),
        ..Toleration::default()
    });
    let theirs = blueprint.spec.pod.tolerations.iter().cloned();
    own.into_iter().chain(theirs).collect()
}

fn volumes(blueprint: &Blueprint<'_>, download: &Download) -> Vec<Volume> {
    let mut volumes = vec![Volume {
        name: names::CONTROL_VOLUME.to_owned(),
        config_map: Some(ConfigMapVolumeSource {
            name: names::control_config_map(blueprint.name),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    }];
    if let Some(ModelSource::Claim { claim, .. }) = &blueprint.source {
        volumes.push(Volume {
            name: names::MODEL_VOLUME.to_owned(),
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim.clone(),
                read_only: Some(true),
            }),
            ..Volume::default()
        });
    }
    volumes.extend(download.volume.clone());
    volumes.extend(blueprint.spec.pod.volumes.iter().cloned());
    volumes
}

fn volume_mounts(blueprint: &Blueprint<'_>, download: &Download) -> Vec<VolumeMount> {
    let read_only = |name: &str, path: &str| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    };
    let mut mounts = vec![read_only(names::CONTROL_VOLUME, names::CONTROL_MOUNT_PATH)];
    if let Some(ModelSource::Claim { .. }) = &blueprint.source {
        mounts.push(read_only(names::MODEL_VOLUME, names::MODEL_MOUNT_PATH));
    }
    mounts.extend(download.mount.clone());
    mounts.extend(blueprint.spec.pod.volume_mounts.iter().cloned());
    mounts
}

fn port(name: &str, number: i32) -> ContainerPort {
    ContainerPort {
        name: Some(name.to_owned()),
        container_port: number,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn probe(path: &str, period: i32, timeout: i32, failures: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String(names::HTTP_PORT_NAME.to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        timeout_seconds: Some(timeout),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

fn non_empty<T>(map: BTreeMap<String, T>) -> Option<BTreeMap<String, T>> {
    (!map.is_empty()).then_some(map)
}

fn non_empty_list<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

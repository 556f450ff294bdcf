//! The life of one InferenceService: what it owns, what it says, what it leaves alone.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Service as KubeService, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::{Value, json};
use stoker_e2e::{Cluster, Service, eventually, process};

/// A service on the simulated T4 that asks for no GPU, so that only the case at hand matters.
fn simulated(name: &str) -> Value {
    json!({
        "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": name},
        "spec": {"engine": {"device": "simulated", "simulatedProfile": "t4"},
                 "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}}},
    })
}

async fn ready(cluster: &Cluster, name: &str) -> Result<Service> {
    cluster.apply_object(&simulated(name)).await?;
    let service = cluster.service(name);
    service.wait_for("Ready", "True", None, 60).await?;
    Ok(service)
}

async fn owned<K>(cluster: &Cluster, name: &str) -> Result<K>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
    <K as Resource>::DynamicType: Default,
{
    let object = cluster.api::<K>().get(name).await?;
    let owner = object
        .owner_references()
        .first()
        .context("it has no owner")?;
    ensure!(
        owner.kind == "InferenceService" && owner.controller == Some(true),
        "its owner is {owner:?}"
    );
    Ok(object)
}

#[tokio::test]
async fn lifecycle_owns_its_objects_and_corrects_drift() -> Result<()> {
    let cluster = Cluster::with_namespace("owned").await?;
    let service = ready(&cluster, "llama").await?;
    owned::<KubeService>(&cluster, "llama").await?;
    owned::<PodDisruptionBudget>(&cluster, "llama").await?;
    owned::<ServiceAccount>(&cluster, "llama").await?;
    let control = owned::<ConfigMap>(&cluster, "llama-control").await?;
    let key = control
        .data
        .unwrap_or_default()
        .remove("public.pem")
        .unwrap_or_default();
    ensure!(key.contains("PUBLIC KEY"), "public.pem is {key:?}");
    let before = owned::<Deployment>(&cluster, "llama").await?;

    // Nothing changes while nothing changes: no hot loop, no new ReplicaSet.
    tokio::time::sleep(std::time::Duration::from_secs(8)).await;
    let after = owned::<Deployment>(&cluster, "llama").await?;
    ensure!(
        before.metadata.generation == after.metadata.generation,
        "an idle operator rewrote the Deployment"
    );

    // Drift on an owned field is corrected; a label of somebody else's stays.
    let deployments: Api<Deployment> = cluster.api();
    let drift = json!({"metadata": {"labels": {"team": "night-shift"}},
                       "spec": {"template": {"spec": {"terminationGracePeriodSeconds": 99}}}});
    deployments
        .patch("llama", &PatchParams::default(), &Patch::Merge(drift))
        .await?;
    eventually("the drift is corrected", 20, || async {
        let deployment = deployments.get("llama").await?;
        let pod = deployment
            .spec
            .as_ref()
            .and_then(|spec| spec.template.spec.as_ref());
        let grace = pod.and_then(|pod| pod.termination_grace_period_seconds);
        Ok((grace != Some(99)).then_some(()))
    })
    .await?;
    ensure!(
        deployments
            .get("llama")
            .await?
            .labels()
            .get("team")
            .is_some(),
        "a foreign label was taken away"
    );

    // A deleted part comes back; the whole goes with its owner.
    cluster
        .api::<KubeService>()
        .delete("llama", &DeleteParams::default())
        .await?;
    eventually("the Service is back", 20, || async {
        Ok(cluster.api::<KubeService>().get_opt("llama").await?)
    })
    .await?;
    service
        .api()
        .delete("llama", &DeleteParams::foreground())
        .await?;
    eventually("everything is collected", 60, || async {
        let left =
            deployments.get_opt("llama").await?.is_some() || !service.pods().await?.is_empty();
        Ok((!left).then_some(()))
    })
    .await?;
    cluster.remove_namespace().await
}

#[tokio::test]
async fn lifecycle_tells_why_a_pod_does_not_start() -> Result<()> {
    let cluster = Cluster::with_namespace("failures").await?;
    let mut image = simulated("no-image");
    image["spec"]["pod"]["image"] = json!("stoker/there-is-no-such-image:1");
    cluster.apply_object(&image).await?;
    let mut accelerator = simulated("no-gpu");
    accelerator["spec"]["resources"]["accelerator"] =
        json!({"resource": "nvidia.com/gpu", "count": 64});
    cluster.apply_object(&accelerator).await?;
    let mut crash = simulated("crashes");
    crash["spec"]["engine"]["extraArgs"] = json!(["--no-such-flag"]);
    cluster.apply_object(&crash).await?;
    let mut driver = simulated("no-driver");
    driver["spec"]["engine"] = json!({"device": "cuda"});
    // Any file: the driver is looked for first.
    driver["spec"]["model"] = json!({"source": "file:///etc/passwd"});
    driver["spec"]["resources"]["accelerator"] = json!({});
    cluster.apply_object(&driver).await?;
    let mut volume = simulated("no-claim");
    volume["spec"]["engine"] = json!({"device": "cpu"});
    volume["spec"]["model"] = json!({"source": "pvc://no-such-claim/model.gguf"});
    cluster.apply_object(&volume).await?;

    let says = async |name: &str, kind: &str, fragment: &str| -> Result<()> {
        let service = cluster.service(name);
        eventually(&format!("{name}: {kind} says {fragment:?}"), 90, || async {
            let condition = service.condition(kind).await?;
            let text = format!("{} {}", condition["reason"], condition["message"]);
            Ok((condition["status"] == "False" && text.contains(fragment)).then_some(()))
        })
        .await?;
        let ready = service.condition("Ready").await?;
        ensure!(
            ready["status"] == "False",
            "{name} is Ready without a replica: {ready}"
        );
        Ok(())
    };
    says("no-image", "Ready", "there-is-no-such-image").await?;
    says("no-gpu", "Scheduled", "Insufficient nvidia.com/gpu").await?;
    says("no-gpu", "Scheduled", "WaitingForAccelerator").await?;
    says("crashes", "Ready", "--no-such-flag").await?;
    says("no-claim", "Ready", "no-such-claim").await?;
    says("no-driver", "Ready", "DeviceUnusable").await?;
    says("no-driver", "Ready", "no NVIDIA driver is here").await?;
    says("no-driver", "ModelLoaded", "no NVIDIA driver is here").await?;
    let told = cluster
        .api::<Event>()
        .list(&ListParams::default().fields("involvedObject.name=no-driver"))
        .await?;
    let note = |event: &Event| {
        let message = event.message.clone().unwrap_or_default();
        event.reason.as_deref() == Some("DeviceUnusable")
            && message.contains("no NVIDIA driver is here")
    };
    ensure!(
        told.items.iter().filter(|event| note(event)).count() == 1,
        "no-driver has the events {:#?}",
        told.items
    );

    // Once a condition, not once a reconcile: the events of each object stay few.
    let events = cluster
        .api::<Event>()
        .list(&ListParams::default().fields("involvedObject.name=no-gpu"))
        .await?;
    ensure!(
        (1..=6).contains(&events.items.len()),
        "no-gpu has {} events",
        events.items.len()
    );
    cluster.remove_namespace().await
}

#[tokio::test]
async fn lifecycle_is_not_ready_while_no_replica_answers() -> Result<()> {
    let cluster = Cluster::with_namespace("unready").await?;
    let service = ready(&cluster, "llama").await?;
    let transition = service.condition("Ready").await?["lastTransitionTime"].clone();
    let pod = service
        .pods()
        .await?
        .pop()
        .context("a ready service has no pod")?;
    process::kill_container(&pod)?;
    service.wait_for("Ready", "False", None, 20).await?;
    let again = service.wait_for("Ready", "True", None, 60).await?;
    ensure!(
        again["lastTransitionTime"] != transition,
        "the transition left no trace"
    );
    cluster.remove_namespace().await
}

#[tokio::test]
async fn lifecycle_scales_by_hand_in_mode_manual_only() -> Result<()> {
    let cluster = Cluster::with_namespace("manual").await?;
    let service = ready(&cluster, "llama").await?;
    let scale = |replicas: i32| Patch::Merge(json!({"spec": {"replicas": replicas}}));
    let refused = service
        .api()
        .patch_scale("llama", &PatchParams::default(), &scale(2))
        .await;
    let message = refused
        .err()
        .context("mode Auto took a change of replicas")?
        .to_string();
    ensure!(
        message.contains("scaling.mode: Manual"),
        "the refusal says {message:?}"
    );

    let mode = json!({"spec": {"scaling": {"mode": "Manual"}}});
    service
        .api()
        .patch("llama", &PatchParams::default(), &Patch::Merge(mode))
        .await?;
    service
        .api()
        .patch_scale("llama", &PatchParams::default(), &scale(2))
        .await?;
    eventually("two replicas are ready", 60, || async {
        Ok((service.status().await?["readyReplicas"] == 2).then_some(()))
    })
    .await?;
    cluster.remove_namespace().await
}

//! Dials in seconds, replicas in minutes: the ramp of the demo, with its bars.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use stoker_e2e::{Cluster, Load, Service, eventually};

fn simulated(profile: &str, gpus: bool, max_replicas: u32) -> Value {
    let mut object = json!({
        "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "llama-3b"},
        "spec": {
            "engine": {"device": "simulated", "simulatedProfile": profile,
                       "maxNumSeqs": {"min": 1, "max": 256, "initial": 8}},
            "scaling": {"minReplicas": 1, "maxReplicas": max_replicas, "scaleDownStabilizationSeconds": 20},
            "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}},
        },
    });
    if gpus {
        object["spec"]["resources"]["accelerator"] =
            json!({"resource": "nvidia.com/gpu", "count": 1});
    }
    object
}

/// Sets how many GPUs the local node offers.
async fn set_gpus(cluster: &Cluster, count: u32) -> Result<()> {
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let node = nodes
        .list(&ListParams::default())
        .await?
        .items
        .pop()
        .context("the cluster has no node")?;
    let gpus = json!({"nvidia.com/gpu": count.to_string()});
    let patch = Patch::Merge(json!({"status": {"capacity": gpus, "allocatable": gpus}}));
    nodes
        .patch_status(
            &node.metadata.name.unwrap_or_default(),
            &PatchParams::default(),
            &patch,
        )
        .await?;
    Ok(())
}

/// Whether 99 % of the requests that ended in the last 10 s were good ones, as the client saw them.
fn meets_objectives(progress: &Value) -> bool {
    progress["good_percent"]
        .as_f64()
        .is_some_and(|percent| percent >= 99.0)
}

async fn cap(service: &Service) -> Result<i64> {
    Ok(service.status().await?["dials"]["maxNumSeqs"]
        .as_i64()
        .unwrap_or_default())
}

async fn back_to_minimum(service: &Service) -> Result<()> {
    eventually("one replica is left", 180, || async {
        let status = service.status().await?;
        Ok((status["desiredReplicas"] == 1 && status["replicas"] == 1).then_some(()))
    })
    .await
}

#[tokio::test]
async fn scaling_ramp_on_the_simulated_t4() -> Result<()> {
    let cluster = Cluster::with_namespace("ramp").await?;
    set_gpus(&cluster, 3).await?;
    cluster.apply_object(&simulated("t4", true, 5)).await?;
    let service = cluster.service("llama-3b");
    service.wait_for("Ready", "True", None, 60).await?;

    let mut load = Load::start(
        "ramp-t4",
        &service.url().await?,
        "llama-3b",
        "4:10s,72:50s,72:100s",
        &[
            "--ramp-shape",
            "linear",
            "--prompt-tokens",
            "800",
            "--max-tokens",
            "120",
            "--goodput",
            "ttft:2000,tpot:100",
        ],
    )?;
    let begun = Instant::now();
    let mut dials_after = None;
    let mut waited = false;
    let mut last_ready = (0, Instant::now());
    let mut good_after: Option<Duration> = None;
    while load.is_running()? {
        if dials_after.is_none() && cap(&service).await? > 8 {
            dials_after = Some(begun.elapsed());
        }
        let scheduled = service.condition("Scheduled").await?;
        if scheduled["reason"] == "WaitingForAccelerator" && !waited {
            waited = true;
            eventually(
                "the object says that the dials carry on alone",
                20,
                || async {
                    let message = service.condition("ScalingActive").await?["message"].to_string();
                    Ok(message.contains("dials").then_some(()))
                },
            )
            .await?;
            set_gpus(&cluster, 5).await?;
        }
        let ready = service.status().await?["readyReplicas"]
            .as_i64()
            .unwrap_or_default();
        if ready != last_ready.0 {
            last_ready = (ready, Instant::now());
            good_after = None;
        }
        if good_after.is_none() && load.progress().is_some_and(|line| meets_objectives(&line)) {
            good_after = Some(last_ready.1.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let report = load.finish().await?;

    ensure!(
        report.requests() > 200,
        "the load sent {} requests only",
        report.requests()
    );
    ensure!(
        report.failed() == 0,
        "{} of {} requests failed: {:#}",
        report.failed(),
        report.requests(),
        report.0
    );
    let dials_after = dials_after.context("the dials never moved")?;
    ensure!(
        dials_after < Duration::from_secs(10),
        "the dials moved after {dials_after:?}"
    );
    ensure!(waited, "no pod ever waited for a GPU");
    ensure!(
        last_ready.0 > 3,
        "{} replicas were ready in the end",
        last_ready.0
    );
    let good_after =
        good_after.context("the objectives were not met again before the load ended")?;
    ensure!(
        good_after < Duration::from_secs(60),
        "objectives were met {good_after:?} after the last replica"
    );

    back_to_minimum(&service).await?;
    set_gpus(&cluster, 4).await?;
    cluster.remove_namespace().await
}

#[tokio::test]
async fn scaling_cap_follows_the_load_on_the_simulated_h100() -> Result<()> {
    let cluster = Cluster::with_namespace("ramp-h100").await?;
    cluster.apply_object(&simulated("h100", false, 1)).await?;
    let service = cluster.service("llama-3b");
    service.wait_for("Ready", "True", None, 60).await?;
    let mut load = Load::start(
        "ramp-h100",
        &service.url().await?,
        "llama-3b",
        "4:10s,48:30s",
        &["--prompt-tokens", "400", "--max-tokens", "100"],
    )?;
    let mut highest = 0;
    while load.is_running()? {
        highest = highest.max(cap(&service).await?);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let report = load.finish().await?;
    ensure!(
        report.failed() == 0,
        "{} of {} requests failed",
        report.failed(),
        report.requests()
    );
    ensure!(
        highest >= 48,
        "the cap went up to {highest} only while 48 users waited"
    );
    cluster.remove_namespace().await
}

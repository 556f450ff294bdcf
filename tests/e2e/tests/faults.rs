//! kill -9 in the middle of a load: of the operator, and of a server.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;
use serde_json::json;
use stoker_e2e::{Cluster, Load, eventually, process};

async fn operator_pod(cluster: &Cluster) -> Result<Pod> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), "stoker-system");
    let selector = ListParams::default().labels("app.kubernetes.io/name=stoker-operator");
    pods.list(&selector)
        .await?
        .items
        .pop()
        .context("the operator isn't installed in stoker-system")
}

fn restarts(pod: &Pod) -> i32 {
    let status = pod
        .status
        .as_ref()
        .and_then(|status| status.container_statuses.as_ref());
    status
        .into_iter()
        .flatten()
        .map(|container| container.restart_count)
        .sum()
}

#[tokio::test]
async fn faults_killed_operator_and_server_cost_no_healthy_request() -> Result<()> {
    let cluster = Cluster::with_namespace("faults").await?;
    cluster
        .apply_object(&json!({
            "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "llama-3b"},
            "spec": {
                "engine": {"device": "simulated", "simulatedProfile": "t4"},
                "scaling": {"minReplicas": 2, "maxReplicas": 4, "scaleDownStabilizationSeconds": 20},
                "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}},
            },
        }))
        .await?;
    let service = cluster.service("llama-3b");
    eventually("two replicas are ready", 60, || async {
        Ok((service.status().await?["readyReplicas"] == 2).then_some(()))
    })
    .await?;

    let load = Load::start(
        "faults",
        &service.url().await?,
        "llama-3b",
        "8:10s,40:80s",
        &["--prompt-tokens", "800", "--max-tokens", "120"],
    )?;
    tokio::time::sleep(Duration::from_secs(20)).await;

    // The operator dies: no request notices.
    let operator = operator_pod(&cluster).await?;
    process::kill_container(&operator)?;
    eventually("the operator's container is back", 60, || async {
        let pod = operator_pod(&cluster).await?;
        Ok((restarts(&pod) > restarts(&operator)).then_some(()))
    })
    .await?;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let progress = load.progress().context("the load reports nothing")?;
    ensure!(
        progress["failed"] == 0,
        "requests failed when the operator died: {progress}"
    );

    // A server dies: only what it was working on is lost, at the moment of the kill.
    let pod = service
        .pods()
        .await?
        .into_iter()
        .find(|pod| restarts(pod) == 0)
        .context("no pod to kill")?;
    let on_it = running_on(&pod).await?;
    process::kill_container(&pod)?;
    let report = load.finish().await?;
    ensure!(
        report.failed() <= on_it,
        "{} requests failed, but only {on_it} were on the killed replica: {:#}",
        report.failed(),
        report.0
    );

    // The end state is the same as without the kills.
    eventually("the minimum is back, all ready", 180, || async {
        let status = service.status().await?;
        Ok((status["replicas"] == 2
            && status["readyReplicas"] == 2
            && status["desiredReplicas"] == 2)
            .then_some(()))
    })
    .await?;
    cluster.remove_namespace().await
}

/// Requests that may be on a replica: what it runs, what waits there, and a margin for those that
/// arrive between this look and the kill, or wait in a connection's buffer.
async fn running_on(pod: &Pod) -> Result<u64> {
    let ip = pod
        .status
        .as_ref()
        .and_then(|status| status.pod_ip.clone())
        .context("the pod has no address")?;
    let text = reqwest::get(format!("http://{ip}:8000/metrics"))
        .await?
        .text()
        .await?;
    let gauge = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line
            .and_then(|line| line.rsplit(' ').next())
            .and_then(|value| value.parse::<f64>().ok());
        value.unwrap_or_default() as u64
    };
    Ok(gauge("vllm:num_requests_running") + gauge("vllm:num_requests_waiting") + 5)
}

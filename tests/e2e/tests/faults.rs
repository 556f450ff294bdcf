//! kill -9 in the middle of a load: of the operator, and of a server.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::Api;
use kube::api::ListParams;
use serde_json::{Value, json};
use stoker_e2e::{Cluster, Load, eventually, process, router};

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

/// What scaling has learnt, once load was watched, as it was stored after a time (seconds since 1970).
async fn stored_memory(cluster: &Cluster, after: f64) -> Result<Value> {
    eventually("the scaling memory is stored", 120, || async {
        let maps = cluster.api::<ConfigMap>();
        let data = maps
            .get_opt("llama-3b-memory")
            .await?
            .and_then(|map| map.data);
        let data = data.unwrap_or_default();
        let text = data.get("memory.json").map_or("null", String::as_str);
        let memory: Value = serde_json::from_str(text)?;
        let watched = memory["recurrence"]["slots"]["start"].as_f64() > Some(0.0);
        Ok((watched && memory["decided_at"].as_f64() > Some(after)).then_some(memory))
    })
    .await
}

fn now() -> Result<f64> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(since.as_secs_f64())
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

    let learnt = stored_memory(&cluster, 0.0).await?;
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
    let killed = now()?;
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
    // It goes on with what it knew: the load of before is still the beginning of what is stored.
    let after = stored_memory(&cluster, killed + 1.0).await?;
    let began = |memory: &Value| memory["recurrence"]["slots"]["start"].clone();
    ensure!(
        began(&after) == began(&learnt),
        "what was learnt before the operator died is lost: {learnt:#} became {after:#}"
    );

    // A server dies: only streams that it had begun are lost; the rest goes to another replica.
    let pod = service
        .pods()
        .await?
        .into_iter()
        .find(|pod| restarts(pod) == 0)
        .context("no pod to kill")?;
    let cut_before = router::cut_streams(&cluster).await?;
    process::kill_container(&pod)?;
    let report = load.finish().await?;
    let cut = router::cut_streams(&cluster).await? - cut_before;
    let told = report.failures("stream_error");
    ensure!(
        report.failed() == told && told as f64 == cut,
        "{} requests failed, {told} of them with an error event; {cut} streams were cut: {:#}",
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

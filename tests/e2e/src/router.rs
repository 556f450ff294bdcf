//! The routers of the chart, as tests look at them.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;

use crate::cluster::Cluster;

/// The routers' pods that are ready.
pub async fn routers(cluster: &Cluster) -> Result<Vec<Pod>> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), "stoker-system");
    let selector = ListParams::default().labels("app.kubernetes.io/name=stoker-router");
    let mut pods = pods.list(&selector).await?.items;
    pods.retain(|pod| pod.metadata.deletion_timestamp.is_none() && is_ready(pod));
    Ok(pods)
}

pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The value of a series, over all its labels that contain `label`.
pub fn series(text: &str, name: &str, label: &str) -> f64 {
    let lines = text.lines().filter(|line| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']))
            && line.contains(label)
    });
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

/// What a pod says at `/metrics` of a port.
pub async fn metrics(pod: &Pod, port: u16) -> Result<String> {
    let ip = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
    let ip = ip.context("the pod has no address")?;
    Ok(reqwest::get(format!("http://{ip}:{port}/metrics"))
        .await?
        .text()
        .await?)
}

/// Streams of a service that routers had to cut because their replica died.
pub async fn cut_streams(cluster: &Cluster) -> Result<f64> {
    let mut sum = 0.0;
    for router in routers(cluster).await? {
        let text = metrics(&router, 9000).await?;
        sum += series(
            &text,
            "stoker_router_broken_streams_total",
            &cluster.namespace,
        );
    }
    Ok(sum)
}

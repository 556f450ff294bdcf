//! Replicas killed, routers replaced, rollouts and scale changes, in random order under load. Runs for
//! SOAK_SECONDS (default 60).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::DeleteParams;
use kube::{Api, ResourceExt};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use stoker_e2e::router::{is_ready, metrics, routers, series};
use stoker_e2e::{Cluster, Load, Service, eventually, process};

fn fleet(replicas: u64, rollout: u64) -> Value {
    json!({
        "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "llama-3b"},
        "spec": {
            "engine": {"device": "simulated", "simulatedProfile": "t4", "maxNumSeqs": {"initial": 16}},
            "scaling": {"mode": "Manual"}, "replicas": replicas,
            "rollout": {"maxSurge": 1, "maxUnavailable": 0},
            "pod": {"annotations": {"rollout": rollout.to_string()}},
            "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}},
        },
    })
}

async fn ready_pods(service: &Service) -> Result<Vec<Pod>> {
    let mut pods = service.pods().await?;
    pods.retain(|pod| pod.metadata.deletion_timestamp.is_none() && is_ready(pod));
    Ok(pods)
}

/// Kills one of several replicas; gives how many streams it may have cut.
async fn kill_a_replica(service: &Service, random: &mut StdRng) -> Result<u64> {
    let pods = ready_pods(service).await?;
    if pods.len() < 2 {
        return Ok(0);
    }
    let pod = pods.choose(random).context("no pod")?;
    let running = series(&metrics(pod, 8000).await?, "vllm:num_requests_running", "");
    process::kill_container(pod)?;
    // What began between the look and the kill.
    Ok(running as u64 + 2)
}

/// Has one of two routers replaced, as a node's drain would.
async fn replace_a_router(cluster: &Cluster, random: &mut StdRng) -> Result<()> {
    let ready = routers(cluster).await?;
    if ready.len() < 2 {
        return Ok(());
    }
    let router = ready.choose(random).context("no router")?;
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), "stoker-system");
    pods.delete(&router.name_any(), &DeleteParams::default())
        .await?;
    Ok(())
}

#[tokio::test]
async fn churn_loses_nothing_but_streams_of_killed_replicas() -> Result<()> {
    let seconds: u64 = match std::env::var("SOAK_SECONDS") {
        Ok(text) => text.parse().context("SOAK_SECONDS must be a number")?,
        Err(_) => 60,
    };
    let cluster = Cluster::with_namespace("churn").await?;
    let (mut replicas, mut rollout) = (3, 0);
    cluster.apply_object(&fleet(replicas, rollout)).await?;
    let service = cluster.service("llama-3b");
    eventually("three replicas are ready", 60, || async {
        Ok((ready_pods(&service).await?.len() == 3).then_some(()))
    })
    .await?;
    let mut load = Load::start(
        "churn",
        &service.url().await?,
        "llama-3b",
        &format!("16:{seconds}s"),
        &["--prompt-tokens", "100", "--max-tokens", "60"],
    )?;
    let mut random = StdRng::seed_from_u64(7);
    let (begun, mut may_be_cut, mut actions) = (Instant::now(), 0, 0);
    while load.is_running()? && begun.elapsed().as_secs() + 5 < seconds {
        tokio::time::sleep(Duration::from_millis(random.random_range(4_000..9_000))).await;
        match random.random_range(0..4) {
            0 => may_be_cut += kill_a_replica(&service, &mut random).await?,
            1 => replace_a_router(&cluster, &mut random).await?,
            2 => {
                replicas = random.random_range(2..5);
                cluster.apply_object(&fleet(replicas, rollout)).await?;
            }
            _ => {
                rollout += 1;
                cluster.apply_object(&fleet(replicas, rollout)).await?;
            }
        }
        actions += 1;
    }
    let report = load.finish().await?;
    let cut = report.failures("stream_error");
    println!(
        "{} requests through {actions} disturbances: {cut} streams of killed replicas were cut \
         (at most {may_be_cut} could be), {} others failed",
        report.requests(),
        report.failed() - cut
    );
    ensure!(
        report.requests() > seconds,
        "only {} requests were sent",
        report.requests()
    );
    ensure!(
        report.failed() == cut && cut <= may_be_cut,
        "{:#}",
        report.0
    );
    cluster.remove_namespace().await
}

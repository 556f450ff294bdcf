//! A real model answers through the whole path.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::Api;
use kube::api::DeleteParams;
use stoker_e2e::{Cluster, repository};

#[tokio::test]
async fn serving_smollm2_names_the_capital_of_france() -> Result<()> {
    let cluster = Cluster::with_namespace("serving").await?;
    // A volume of its own: one stays with the first claim that it met, and the demo's may be in use.
    let manifest = std::fs::read_to_string(repository("examples/smollm2-cpu.yaml"))?;
    let volumes: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let _ = volumes.delete("e2e-models", &DeleteParams::default()).await;
    cluster
        .apply(&manifest.replace("stoker-models", "e2e-models"))
        .await?;
    let service = cluster.service("smollm2");
    service.wait_for("Ready", "True", None, 120).await?;

    let answer = service.chat("What is the capital of France?").await?;
    ensure!(
        answer == "The capital of France is Paris.",
        "the answer was {answer:?}"
    );

    let status = service.status().await?;
    ensure!(status["readyReplicas"] == 1, "status is {status:#}");
    ensure!(
        status["observedGeneration"].is_number(),
        "status is {status:#}"
    );
    service.wait_for("ModelLoaded", "True", None, 10).await?;
    cluster.remove_namespace().await?;
    volumes
        .delete("e2e-models", &DeleteParams::default())
        .await?;
    Ok(())
}

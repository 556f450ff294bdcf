//! A real model answers through the whole path.

use anyhow::{Result, ensure};
use stoker_e2e::{Cluster, repository};

#[tokio::test]
async fn serving_smollm2_names_the_capital_of_france() -> Result<()> {
    let cluster = Cluster::with_namespace("serving").await?;
    let manifest = std::fs::read_to_string(repository("examples/smollm2-cpu.yaml"))?;
    cluster.apply(&manifest).await?;
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
    cluster.remove_namespace().await
}

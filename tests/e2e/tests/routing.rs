//! The router in front of a service: room, sleep, keys.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{PersistentVolume, Secret};
use kube::Api;
use kube::api::DeleteParams;
use serde_json::{Value, json};
use stoker_e2e::router::{is_ready, metrics, series};
use stoker_e2e::{Cluster, Load, Service, eventually, repository};

fn simulated(name: &str, spec: Value) -> Value {
    let mut object = json!({
        "apiVersion": "serving.stoker.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": name},
        "spec": {
            "engine": {"device": "simulated", "simulatedProfile": "t4", "maxNumSeqs": {"initial": 16}},
            "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}},
        },
    });
    for (field, value) in spec.as_object().into_iter().flatten() {
        object["spec"][field] = value.clone();
    }
    object
}

async fn replicas(service: &Service, wanted: u64, seconds: u64) -> Result<()> {
    let what = format!("{} has {wanted} ready replicas", service.name);
    eventually(&what, seconds, || async {
        let status = service.status().await?;
        let count = |field: &str| status[field].as_u64().unwrap_or(0);
        Ok((count("replicas") == wanted && count("readyReplicas") == wanted).then_some(()))
    })
    .await
}

/// A service that nobody uses goes to zero, and comes back for whoever asks.
#[tokio::test]
async fn routing_sleeps_at_zero_and_wakes() -> Result<()> {
    let cluster = Cluster::with_namespace("sleep").await?;
    let manifest = std::fs::read_to_string(repository("examples/smollm2-cpu.yaml"))?;
    let volumes: Api<PersistentVolume> = Api::all(cluster.client.clone());
    let _ = volumes.delete("e2e-sleep", &DeleteParams::default()).await;
    eventually("an earlier run's volume is gone", 60, || async {
        let volume = volumes.get_opt("e2e-sleep").await?;
        Ok(volume.is_none().then_some(()))
    })
    .await?;
    let manifest = manifest
        .replace("stoker-models", "e2e-sleep")
        .replace("minReplicas: 1", "minReplicas: 0\n    idleSeconds: 10");
    cluster.apply(&manifest).await?;
    let service = cluster.service("smollm2");
    service.wait_for("Ready", "True", None, 120).await?;
    service
        .wait_for("Available", "False", Some("ScaledToZero"), 90)
        .await?;
    replicas(&service, 0, 60).await?;
    let ready = service.condition("Ready").await?;
    ensure!(
        ready["status"] == "True" && ready["reason"] == "ScaledToZero",
        "asleep, Ready is {ready}"
    );

    // One stream, timed to its first token.
    let url = format!("{}/v1/completions", service.url().await?);
    let limit = Duration::from_secs(60);
    let client = reqwest::Client::builder().timeout(limit).build()?;
    let body =
        json!({"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 8, "stream": true});
    let asked = Instant::now();
    let mut events = client
        .post(&url)
        .json(&body)
        .send()
        .await?
        .error_for_status()?
        .bytes_stream();
    let mut text = String::new();
    let first = loop {
        let chunk = events
            .next()
            .await
            .context("the stream ended without a token")??;
        text.push_str(&String::from_utf8_lossy(&chunk));
        if text.contains("\"text\"") {
            break asked.elapsed();
        }
    };
    println!("from zero to the first token: {:.2} s", first.as_secs_f64());
    while events.next().await.transpose()?.is_some() {}

    // A hundred at once while it starts.
    service
        .wait_for("Available", "False", Some("ScaledToZero"), 90)
        .await?;
    replicas(&service, 0, 60).await?;
    let body = json!({"model": "smollm2", "prompt": "Once upon a time", "max_tokens": 4});
    let asks = (0..100).map(|_| async {
        let answer = client.post(&url).json(&body).send().await?;
        Ok::<_, anyhow::Error>(answer.status().as_u16())
    });
    let answers = futures::future::join_all(asks).await;
    let failed: Vec<_> = answers.iter().filter(|a| !matches!(a, Ok(200))).collect();
    ensure!(
        failed.is_empty(),
        "{} of 100 failed: {:?}",
        failed.len(),
        failed.first()
    );

    cluster.remove_namespace().await?;
    volumes
        .delete("e2e-sleep", &DeleteParams::default())
        .await?;
    Ok(())
}

/// A new replica carries its share within seconds, though every client keeps its connection.
#[tokio::test]
async fn routing_gives_a_new_replica_its_share() -> Result<()> {
    let cluster = Cluster::with_namespace("share").await?;
    let by_hand = json!({"scaling": {"mode": "Manual"}, "replicas": 1});
    cluster
        .apply_object(&simulated("llama-3b", by_hand))
        .await?;
    let service = cluster.service("llama-3b");
    replicas(&service, 1, 60).await?;
    let load = Load::start(
        "share",
        &service.url().await?,
        "llama-3b",
        "16:45s",
        &["--prompt-tokens", "100", "--max-tokens", "100"],
    )?;
    tokio::time::sleep(Duration::from_secs(10)).await;
    cluster
        .apply_object(&simulated(
            "llama-3b",
            json!({"scaling": {"mode": "Manual"}, "replicas": 2}),
        ))
        .await?;
    let new = eventually("the second replica is ready", 60, || async {
        let pods = service.pods().await?;
        let ready: Vec<_> = pods.iter().filter(|pod| is_ready(pod)).collect();
        let youngest = ready
            .iter()
            .max_by_key(|pod| pod.metadata.creation_timestamp.clone());
        Ok((ready.len() == 2)
            .then(|| youngest.map(|pod| (**pod).clone()))
            .flatten())
    })
    .await?;
    let since = Instant::now();
    eventually("the new replica runs its share of 16", 15, || async {
        let text = metrics(&new, 8000).await?;
        Ok((series(&text, "vllm:num_requests_running", "") >= 5.0).then_some(()))
    })
    .await?;
    println!("its share after {:.1} s", since.elapsed().as_secs_f64());
    let report = load.finish().await?;
    ensure!(
        report.failed() == 0,
        "{} requests failed: {:#}",
        report.failed(),
        report.0
    );
    cluster.remove_namespace().await
}

/// Keys come from a Secret, are asked for, limited, and read again when they change.
#[tokio::test]
async fn routing_asks_for_keys_of_a_secret() -> Result<()> {
    let cluster = Cluster::with_namespace("keys").await?;
    let access = json!({"access": {"apiKeySecret": "keys",
        "perKey": [{"name": "small", "requestsPerMinute": 6}]}});
    cluster.apply_object(&simulated("llama-3b", access)).await?;
    let service = cluster.service("llama-3b");
    // Without the right to read the Secret, and then without the Secret, nobody may use it, and the
    // object says what to do.
    told(&service, "install the chart with router.apiKeys=true").await?;
    let role = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "keys"});
    cluster
        .apply_object(
            &json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
            "metadata": {"name": "keys"},
            "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]}),
        )
        .await?;
    cluster
        .apply_object(&json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": {"name": "keys"}, "roleRef": role, "subjects": [
                {"kind": "ServiceAccount", "name": "stoker-operator", "namespace": "stoker-system"}]}))
        .await?;
    told(&service, "kubectl create secret generic keys").await?;

    let secret = |large: &str| {
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys"},
               "stringData": {"large": large, "small": "sk-small"}})
    };
    cluster.apply_object(&secret("sk-large")).await?;
    service.wait_for("Ready", "True", None, 60).await?;
    let url = format!("{}/v1/completions", service.url().await?);
    let client = reqwest::Client::new();
    let ask = |key: &'static str| {
        let body = json!({"model": "llama-3b", "prompt": [1, 2, 3], "max_tokens": 1});
        let request = client.post(&url).bearer_auth(key).json(&body);
        async move { Ok::<_, anyhow::Error>(request.send().await?.status().as_u16()) }
    };
    eventually("the key is known", 10, || async {
        Ok((ask("sk-large").await? == 200).then_some(()))
    })
    .await?;
    ensure!(ask("sk-wrong").await? == 401, "a wrong key was taken");
    let mut limited = 0;
    for _ in 0..12 {
        limited += u32::from(ask("sk-small").await? == 429);
    }
    ensure!(
        limited >= 6,
        "only {limited} of 12 requests were over the limit of 6 a minute"
    );
    ensure!(ask("sk-large").await? == 200, "one key's limit hit another");

    cluster
        .api::<Secret>()
        .delete("keys", &DeleteParams::default())
        .await?;
    cluster.apply_object(&secret("sk-new")).await?;
    eventually("the changed key is known", 60, || async {
        Ok((ask("sk-new").await? == 200 && ask("sk-large").await? == 401).then_some(()))
    })
    .await?;
    cluster.remove_namespace().await
}

/// Waits until Ready says that the keys can't be read, in these words.
async fn told(service: &Service, words: &str) -> Result<()> {
    eventually(words, 60, || async {
        let ready = service.condition("Ready").await?;
        let message = ready["message"].as_str().unwrap_or_default();
        Ok((ready["reason"] == "ApiKeysUnreadable" && message.contains(words)).then_some(()))
    })
    .await
}

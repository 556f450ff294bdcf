//! An InferenceService under test, read as a user reads it.

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Pod, Service as KubeService};
use kube::api::{DynamicObject, ListParams};
use kube::{Api, CustomResourceExt};
use serde_json::{Value, json};
use stoker_api::InferenceService;

use crate::cluster::{Cluster, eventually};

#[derive(Clone)]
pub struct Service {
    pub cluster: Cluster,
    pub name: String,
}

impl Service {
    pub fn new(cluster: Cluster, name: &str) -> Self {
        Self {
            cluster,
            name: name.to_owned(),
        }
    }

    pub fn api(&self) -> Api<DynamicObject> {
        Api::namespaced_with(
            self.cluster.client.clone(),
            &self.cluster.namespace,
            &InferenceService::api_resource(),
        )
    }

    pub async fn object(&self) -> Result<Value> {
        Ok(serde_json::to_value(self.api().get(&self.name).await?)?)
    }

    pub async fn status(&self) -> Result<Value> {
        Ok(self.object().await?["status"].clone())
    }

    /// The condition of that type; JSON null while there is none.
    pub async fn condition(&self, kind: &str) -> Result<Value> {
        let status = self.status().await?;
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions
            .into_iter()
            .find(|c| c["type"] == kind)
            .unwrap_or(Value::Null))
    }

    /// Waits for a condition of that status and (where given) reason, and returns it.
    pub async fn wait_for(
        &self,
        kind: &str,
        status: &str,
        reason: Option<&str>,
        seconds: u64,
    ) -> Result<Value> {
        let what = format!(
            "{} has condition {kind}={status} {}",
            self.name,
            reason.unwrap_or_default()
        );
        let found = eventually(&what, seconds, || async {
            let condition = self.condition(kind).await?;
            let fits = condition["status"] == status
                && reason.is_none_or(|reason| condition["reason"] == reason);
            Ok(fits.then_some(condition))
        })
        .await;
        match found {
            Ok(condition) => Ok(condition),
            Err(error) => bail!(
                "{error}; its status is {:#}",
                self.status().await.unwrap_or_default()
            ),
        }
    }

    pub async fn pods(&self) -> Result<Vec<Pod>> {
        let selector =
            ListParams::default().labels(&format!("serving.stoker.dev/service={}", self.name));
        Ok(self.cluster.api::<Pod>().list(&selector).await?.items)
    }

    /// The address of its Kubernetes Service, routed to this host.
    pub async fn url(&self) -> Result<String> {
        let service = self.cluster.api::<KubeService>().get(&self.name).await?;
        let ip = service
            .spec
            .and_then(|spec| spec.cluster_ip)
            .context("the Service has no address")?;
        Ok(format!("http://{ip}"))
    }

    /// The model's answer to one question at temperature 0.
    pub async fn chat(&self, question: &str) -> Result<String> {
        let body = json!({"model": self.name, "temperature": 0, "max_tokens": 64,
                          "messages": [{"role": "user", "content": question}]});
        let url = format!("{}/v1/chat/completions", self.url().await?);
        let answer: Value = reqwest::Client::new()
            .post(url)
            .json(&body)
            .send()
            .await?
            .error_for_status()?
            .json()
            .await?;
        let content = answer["choices"][0]["message"]["content"].as_str();
        Ok(content
            .context("the answer has no content")?
            .trim()
            .to_owned())
    }
}

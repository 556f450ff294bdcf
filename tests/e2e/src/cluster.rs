//! A client of the cluster, and namespaces that tests own.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams,
};
use kube::core::GroupVersionKind;
use kube::{Client, discovery};
use serde_json::Value;
use stoker_api::InferenceService;

use crate::service::Service;

#[derive(Clone)]
pub struct Cluster {
    pub client: Client,
    pub namespace: String,
}

impl Cluster {
    /// Connects; `namespace` is there already.
    pub async fn connect(namespace: &str) -> Result<Self> {
        if std::env::var_os("KUBECONFIG").is_none() {
            bail!(
                "KUBECONFIG is not set: run the tests by `make test`, or `make cluster-up` and export what it prints"
            );
        }
        // Two providers may be compiled in; a second call finds one installed, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::try_default()
            .await
            .context("connecting to the cluster of KUBECONFIG")?;
        Ok(Self {
            client,
            namespace: namespace.to_owned(),
        })
    }

    /// Connects, and makes a namespace for one test; one left by an earlier run is removed first.
    pub async fn with_namespace(name: &str) -> Result<Self> {
        let cluster = Self::connect(&format!("e2e-{name}")).await?;
        cluster.remove_namespace().await?;
        let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
        let metadata = ObjectMeta {
            name: Some(cluster.namespace.clone()),
            ..ObjectMeta::default()
        };
        namespaces
            .create(
                &PostParams::default(),
                &Namespace {
                    metadata,
                    ..Namespace::default()
                },
            )
            .await?;
        Ok(cluster)
    }

    /// Deletes the test's namespace and waits until all in it is gone.
    pub async fn remove_namespace(&self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client.clone());
        if namespaces.get_opt(&self.namespace).await?.is_none() {
            return Ok(());
        }
        // Services first, and their pods: a namespace that still has pods when it is deleted waits
        // for half of their grace period, 150 s, before it looks at anything else.
        let services: Api<InferenceService> = self.api();
        match services
            .delete_collection(&DeleteParams::default(), &ListParams::default())
            .await
        {
            // A cluster without the CRD has no services.
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            deleted => drop(deleted?),
        }
        let pods = ListParams::default().labels(stoker_api::names::SERVICE_LABEL);
        eventually("the services' pods are gone", 120, || async {
            let left = self.api::<Pod>().list(&pods).await?.items;
            Ok(left.is_empty().then_some(()))
        })
        .await?;
        namespaces
            .delete(&self.namespace, &DeleteParams::default())
            .await?;
        eventually("the namespace is gone", 120, || async {
            Ok(namespaces
                .get_opt(&self.namespace)
                .await?
                .is_none()
                .then_some(()))
        })
        .await
    }

    /// Applies every document of a manifest as `kubectl apply --server-side` would.
    pub async fn apply(&self, manifest: &str) -> Result<()> {
        for document in
            serde_saphyr::from_multiple::<Value>(manifest).context("the manifest isn't YAML")?
        {
            self.apply_object(&document).await?;
        }
        Ok(())
    }

    pub async fn apply_object(&self, document: &Value) -> Result<DynamicObject> {
        let object: DynamicObject = serde_json::from_value(document.clone())?;
        let types = object.types.clone().context("the manifest names no kind")?;
        let gvk = GroupVersionKind::try_from(&types)?;
        let (resource, capabilities) = discovery::pinned_kind(&self.client, &gvk).await?;
        let api: Api<DynamicObject> = match capabilities.scope {
            discovery::Scope::Cluster => Api::all_with(self.client.clone(), &resource),
            discovery::Scope::Namespaced => {
                Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
            }
        };
        let name = object
            .metadata
            .name
            .clone()
            .context("the manifest names no object")?;
        Ok(api
            .patch(
                &name,
                &PatchParams::apply("e2e").force(),
                &Patch::Apply(document),
            )
            .await?)
    }

    pub fn service(&self, name: &str) -> Service {
        Service::new(self.clone(), name)
    }

    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        <K as kube::Resource>::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}

/// Asks again and again until there is an answer; fails with the last error after `seconds`.
pub async fn eventually<T, F, Fut>(what: &str, seconds: u64, mut ask: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<T>>>,
{
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        let answer = ask().await;
        match answer {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() > end => bail!("not within {seconds} s: {what}"),
            Err(error) if Instant::now() > end => {
                return Err(error.context(format!("not within {seconds} s: {what}")));
            }
            _ => tokio::time::sleep(Duration::from_millis(250)).await,
        }
    }
}

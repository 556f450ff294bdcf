//! Step 1: the objects of a service as they stand.

use std::fmt::Debug;
use std::sync::Arc;

use futures::try_join;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::core::NamespaceResourceScope;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use stoker_api::{InferenceService, ModelSource, names};

use super::Context;
use crate::fence::CallError;
use crate::scaling::Key;

#[derive(Debug, thiserror::Error)]
#[error("could not read {kind} {name}: {source}")]
pub struct ReadError {
    kind: String,
    name: String,
    source: CallError,
}

/// What exists under the names that a service uses, ours or not.
#[derive(Debug, Default)]
pub struct Observed {
    pub service_account: Option<ServiceAccount>,
    pub config_map: Option<ConfigMap>,
    pub service: Option<Service>,
    /// The slice that leads to the routers.
    pub endpoint_slice: Option<EndpointSlice>,
    pub disruption_budget: Option<PodDisruptionBudget>,
    pub deployment: Option<Deployment>,
    pub claim: Claim,
    pub pods: Vec<Arc<Pod>>,
}

/// The PersistentVolumeClaim of a `pvc://` source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Claim {
    #[default]
    NotNeeded,
    /// Bound, or waiting for its first pod.
    Usable,
    Missing(String),
    /// Its volume is gone.
    Lost(String),
}

pub async fn read(service: &InferenceService, context: &Context) -> Result<Observed, ReadError> {
    let client = &context.client;
    let name = service.name_any();
    let namespace = service.namespace().unwrap_or_default();
    let config_map = names::control_config_map(&name);
    let claim = match service.spec.model.parse_source() {
        Ok(Some(ModelSource::Claim { claim, .. })) => Some(claim),
        _ => None,
    };
    let slice = names::router_endpoint_slice(&name);
    let (
        service_account,
        config_map,
        service,
        endpoint_slice,
        disruption_budget,
        deployment,
        claim,
    ) = try_join!(
        get::<ServiceAccount>(client, &namespace, &name),
        get::<ConfigMap>(client, &namespace, &config_map),
        get::<Service>(client, &namespace, &name),
        get::<EndpointSlice>(client, &namespace, &slice),
        get::<PodDisruptionBudget>(client, &namespace, &name),
        get::<Deployment>(client, &namespace, &name),
        read_claim(client, &namespace, claim),
    )?;
    Ok(Observed {
        service_account,
        config_map,
        service,
        endpoint_slice,
        disruption_budget,
        deployment,
        claim,
        pods: context.stores.pods_of(&Key { namespace, name }),
    })
}

async fn read_claim(
    client: &Client,
    namespace: &str,
    claim: Option<String>,
) -> Result<Claim, ReadError> {
    let Some(name) = claim else {
        return Ok(Claim::NotNeeded);
    };
    let found = get::<PersistentVolumeClaim>(client, namespace, &name).await?;
    let phase = |found: PersistentVolumeClaim| found.status.and_then(|status| status.phase);
    Ok(match found {
        None => Claim::Missing(name),
        Some(found) if phase(found.clone()).as_deref() == Some("Lost") => Claim::Lost(name),
        Some(_) => Claim::Usable,
    })
}

async fn get<K>(client: &Client, namespace: &str, name: &str) -> Result<Option<K>, ReadError>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + Debug
        + DeserializeOwned,
{
    let api: Api<K> = Api::namespaced(client.clone(), namespace);
    api.get_opt(name).await.map_err(|source| ReadError {
        kind: K::kind(&()).into_owned(),
        name: name.to_owned(),
        source: source.into(),
    })
}

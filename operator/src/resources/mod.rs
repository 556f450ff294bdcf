//! Pure builders of what a service owns: the same input gives the same bytes.
//!
//! Nothing measured goes into these objects: a changed law or dial must not roll the fleet.

mod config_map;
mod deployment;
mod disruption_budget;
mod download;
pub mod endpoint_slice;
mod pod_template;
pub mod service;
mod service_account;

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use kube::Resource;
use stoker_api::{InferenceService, InferenceServiceSpec, ModelSource, names};

pub use download::HUB_ENDPOINT_ENV;

pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// What the builders read: a valid object and the operator's own settings.
#[derive(Clone, Debug)]
pub struct Blueprint<'a> {
    pub name: &'a str,
    pub namespace: &'a str,
    pub uid: &'a str,
    pub spec: &'a InferenceServiceSpec,
    pub source: Option<ModelSource>,
    pub settings: &'a Settings,
    /// Replicas to ask the Deployment for.
    pub replicas: u32,
    /// Routers that the Service leads to; `None`: straight to the pods.
    pub routers: Option<Vec<IpAddr>>,
}

/// The same for all services of an operator.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Image of services that name none.
    pub server_image: String,
    pub image_pull_policy: String,
    /// The public half of the control key, PEM.
    pub control_public_pem: String,
    /// Base URL of the hub that hf:// means, if there is one.
    pub hub_endpoint: Option<String>,
    /// Directory of the nodes in which their pods share downloaded models.
    pub model_cache_host_path: Option<String>,
}

/// Everything that one service owns.
#[derive(Clone, Debug, PartialEq)]
pub struct Owned {
    pub service_account: ServiceAccount,
    pub config_map: ConfigMap,
    pub service: Service,
    /// Where the Service leads, unless it selects its pods.
    pub endpoint_slice: Option<EndpointSlice>,
    pub disruption_budget: PodDisruptionBudget,
    pub deployment: Deployment,
}

pub fn build(blueprint: &Blueprint<'_>) -> Owned {
    Owned {
        service_account: service_account::build(blueprint),
        config_map: config_map::build(blueprint),
        service: service::build(blueprint),
        endpoint_slice: endpoint_slice::build(blueprint),
        disruption_budget: disruption_budget::build(blueprint),
        deployment: deployment::build(blueprint),
    }
}

/// Base URL of a service inside the cluster.
pub fn endpoint(name: &str, namespace: &str) -> String {
    format!("http://{name}.{namespace}.svc/v1")
}

/// The selector of a service's pods in its text form.
pub fn selector_text(name: &str) -> String {
    format!("{}={name}", names::SERVICE_LABEL)
}

impl Blueprint<'_> {
    fn meta(&self, name: &str) -> ObjectMeta {
        ObjectMeta {
            name: Some(name.to_owned()),
            ..owned_meta(self.name, self.namespace, self.uid)
        }
    }

    /// The server's image.
    fn image(&self) -> &str {
        let own = self.spec.pod.image.as_ref();
        own.unwrap_or(&self.settings.server_image)
    }

    fn labels(&self) -> BTreeMap<String, String> {
        labels(self.name)
    }

    fn selector(&self) -> LabelSelector {
        LabelSelector {
            match_labels: Some(BTreeMap::from([(
                names::SERVICE_LABEL.to_owned(),
                self.name.to_owned(),
            )])),
            ..LabelSelector::default()
        }
    }
}

/// What every object that a service owns carries: it goes when its service goes.
pub fn owned_meta(service: &str, namespace: &str, uid: &str) -> ObjectMeta {
    let owner = OwnerReference {
        api_version: InferenceService::api_version(&()).into_owned(),
        kind: InferenceService::kind(&()).into_owned(),
        name: service.to_owned(),
        uid: uid.to_owned(),
        controller: Some(true),
        block_owner_deletion: None,
    };
    ObjectMeta {
        namespace: Some(namespace.to_owned()),
        labels: Some(labels(service)),
        owner_references: Some(vec![owner]),
        ..ObjectMeta::default()
    }
}

fn labels(service: &str) -> BTreeMap<String, String> {
    let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    BTreeMap::from([
        label("app.kubernetes.io/name", "stoker-server"),
        label("app.kubernetes.io/instance", service),
        label(MANAGED_BY, names::FIELD_MANAGER),
        label(names::SERVICE_LABEL, service),
    ])
}

#[cfg(test)]
#[path = "tests.rs"]
pub(crate) mod tests;

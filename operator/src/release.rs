//! `stoker-operator release`: services go on without operator and routers. The chart runs it when it
//! is uninstalled.

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, Config, ResourceExt};
use stoker_api::{InferenceService, names};
use tracing::{info, warn};

use crate::args::Place;
use crate::controller;
use crate::fence;
use crate::lease::{Elector, Leadership};
use crate::resources::{Blueprint, Settings, service};
use crate::stores::Guarded;

/// For Kubernetes to list the pods that a Service selects, before the routers are taken from it.
const OVERLAP: Duration = Duration::from_secs(2);

/// Waits until no operator leads, then leads every Service straight to its pods, by its selector:
/// from then on Kubernetes alone keeps it going.
pub async fn release(place: Place) -> anyhow::Result<()> {
    let config = Config::infer().await.context("found no Kubernetes API")?;
    let client = fence::client(config, None)?;
    let leases: Api<Lease> = Api::namespaced(client.clone(), &place.namespace);
    let elector = Elector::new(leases, names::LEASE, &place.pod_name, Leadership::none());
    elector.acquire().await;

    let mut released = Vec::new();
    for namespace in place.scopes() {
        let api = controller::api::<Guarded>(&client, namespace.as_deref());
        let listed = api.list(&ListParams::default()).await;
        for object in listed.context("listing InferenceServices")?.items {
            match &object.0 {
                Ok(service) => match select_pods(&client, service).await {
                    Ok(()) => released.push((object.namespace(), object.name_any())),
                    Err(error) => warn!(name = object.name_any(), %error, "stays as it is"),
                },
                Err(invalid) => warn!(
                    name = object.name_any(),
                    error = invalid.error,
                    "unreadable"
                ),
            }
        }
    }
    tokio::time::sleep(OVERLAP).await;
    for (namespace, name) in &released {
        let slices = controller::api::<EndpointSlice>(&client, namespace.as_deref());
        let slice = names::router_endpoint_slice(name);
        match slices.delete(&slice, &DeleteParams::default()).await {
            Ok(_) => info!(name, "leads to its pods"),
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).context(format!("deleting EndpointSlice {slice}")),
        }
    }
    elector.release().await.context("releasing the lease")
}

async fn select_pods(client: &Client, owner: &InferenceService) -> Result<(), kube::Error> {
    let name = owner.name_any();
    let namespace = owner.namespace().unwrap_or_default();
    let api: Api<Service> = Api::namespaced(client.clone(), &namespace);
    let settings = Settings::default();
    let wanted = service::build(&Blueprint {
        name: &name,
        namespace: &namespace,
        uid: &owner.uid().unwrap_or_default(),
        spec: &owner.spec,
        source: None,
        settings: &settings,
        replicas: 0,
        routers: None,
    });
    // One that isn't there serves nobody.
    if api.get_opt(&name).await?.is_none() {
        return Ok(());
    }
    let params = PatchParams::apply(names::FIELD_MANAGER).force();
    api.patch(&name, &params, &Patch::Apply(&wanted))
        .await
        .map(drop)
}
